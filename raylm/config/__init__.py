"""One YAML file = one experiment = one frozen tree of sections.

sections   every setting: type, default, unit, effect
files      load, override, save; faults with their place and the way out
"""

from raylm.config.files import (
    BUILT_IN,
    SAMPLERS,
    corners,
    dump,
    get,
    load,
    load_part,
    override,
    parse_setting,
    save,
)
from raylm.config.sections import (
    BlocksConfig,
    ClusterConfig,
    CorpusConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    ObjectiveConfig,
    SchedulerConfig,
    Section,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    TrainedTokenizer,
    TuneConfig,
)

__all__ = [
    "BUILT_IN",
    "SAMPLERS",
    "BlocksConfig",
    "ClusterConfig",
    "CorpusConfig",
    "EvalConfig",
    "Experiment",
    "ModelConfig",
    "ObjectiveConfig",
    "SchedulerConfig",
    "Section",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainedTokenizer",
    "TuneConfig",
    "corners",
    "dump",
    "get",
    "load",
    "load_part",
    "override",
    "parse_setting",
    "save",
]
