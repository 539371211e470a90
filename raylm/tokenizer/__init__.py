"""Tokenizers, loaded or trained on the corpus; the tokens around a document; and fast encoders.

A tokenizer is one of transformers, with an end-of-text token that follows every document. It needs no padding token.

    loading      the tokenizer that the settings name, identified by its files
    training     a tokenizer of the corpus
    frame        the tokens around a document
    encoders     documents -> ids of their text alone
"""

from raylm.tokenizer.encoders import (
    BATCH,
    LONG,
    Encoder,
    GivenIds,
    choose_encoder,
    encoder,
    given_ids,
    id_type,
    unknown_id,
)
from raylm.tokenizer.frame import Frame, for_export, frame
from raylm.tokenizer.loading import choose, fingerprint, load, load_section, rules, same
from raylm.tokenizer.training import train

__all__ = [
    "BATCH",
    "LONG",
    "Encoder",
    "Frame",
    "GivenIds",
    "choose",
    "choose_encoder",
    "encoder",
    "fingerprint",
    "for_export",
    "frame",
    "given_ids",
    "id_type",
    "load",
    "load_section",
    "rules",
    "same",
    "train",
    "unknown_id",
]
