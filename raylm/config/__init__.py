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
    is_sampler,
    load,
    load_part,
    override,
    parse_setting,
    save,
    spaces,
)
from raylm.config.sections import (
    MUTABLE,
    BlocksConfig,
    ClusterConfig,
    CorpusConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    ObjectiveConfig,
    SchedulerConfig,
    Section,
    StopConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    TrainedTokenizer,
    TuneConfig,
)

__all__ = [
    "BUILT_IN",
    "MUTABLE",
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
    "StopConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainedTokenizer",
    "TuneConfig",
    "corners",
    "dump",
    "get",
    "is_sampler",
    "load",
    "load_part",
    "override",
    "parse_setting",
    "save",
    "spaces",
]
