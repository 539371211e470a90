"""Tokenizers, loaded or trained on the corpus; the tokens around a document; and fast encoders.

A tokenizer is one of transformers, with an end-of-text token that follows every document. It needs no padding token.

    loading      the tokenizer that the settings name, identified by its files
    training     a tokenizer of the corpus
    frame        the tokens around a document
    chat         conversations -> text, and what the assistant says in it
    encoders     documents -> ids of their text alone
"""

from raylm.tokenizer.chat import Conversations, Refused, Unanswered, template_of
from raylm.tokenizer.encoders import (
    BATCH,
    GIVEN,
    LONG,
    AnswerEncoder,
    Encoder,
    GivenIds,
    answer_encoder,
    choose_encoder,
    encoder,
    id_type,
    the_only,
    unknown_id,
)
from raylm.tokenizer.frame import Frame, adds_begin, for_export, frame
from raylm.tokenizer.loading import choose, fingerprint, load, load_section, rules, same
from raylm.tokenizer.training import train

__all__ = [
    "BATCH",
    "GIVEN",
    "LONG",
    "AnswerEncoder",
    "Conversations",
    "Encoder",
    "Frame",
    "GivenIds",
    "Refused",
    "Unanswered",
    "adds_begin",
    "answer_encoder",
    "choose",
    "choose_encoder",
    "encoder",
    "fingerprint",
    "for_export",
    "frame",
    "id_type",
    "load",
    "load_section",
    "rules",
    "same",
    "template_of",
    "the_only",
    "train",
    "unknown_id",
]
