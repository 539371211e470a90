"""One YAML file = one experiment = one frozen tree of sections.

sections         every setting: type, default, unit, effect
values           types of values: what is accepted, what is said of anything else
experiment       the sections together, and the rules between settings of different sections
names            what other tools call a setting
setting_errors   what is wrong with a setting, where it is written, and the way out
space            tune.space: samplers of settings, and whole spaces to choose from
schema           the JSON schema of a file, for editors
files            load, override, save
address          the cluster that a command uses
"""

from raylm.config.address import Address, address_of, is_local
from raylm.config.experiment import MUTABLE, SEEDS, SUGGESTED, Experiment
from raylm.config.files import (
    BUILT_IN,
    absolute,
    dump,
    from_environment,
    get,
    load,
    load_part,
    loads,
    of_trial,
    outline,
    override,
    parse_setting,
    save,
    settings_of,
)
from raylm.config.names import OWNED, as_settings
from raylm.config.schema import json_schema
from raylm.config.sections import (
    WHOLE_SPLIT,
    BlocksConfig,
    ClusterConfig,
    CorpusConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    SchedulerConfig,
    SearcherConfig,
    Section,
    SplitName,
    StopConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    TrainedTokenizer,
    TuneConfig,
)
from raylm.config.space import SAMPLERS, corners, is_sampler, spaces

__all__ = [
    "BUILT_IN",
    "MUTABLE",
    "OWNED",
    "SAMPLERS",
    "SEEDS",
    "SUGGESTED",
    "WHOLE_SPLIT",
    "Address",
    "BlocksConfig",
    "ClusterConfig",
    "CorpusConfig",
    "EvalConfig",
    "Experiment",
    "ModelConfig",
    "ObjectiveConfig",
    "SchedulerConfig",
    "SearcherConfig",
    "Section",
    "SplitName",
    "StopConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainedTokenizer",
    "TuneConfig",
    "absolute",
    "address_of",
    "as_settings",
    "corners",
    "dump",
    "from_environment",
    "get",
    "is_local",
    "is_sampler",
    "json_schema",
    "load",
    "load_part",
    "loads",
    "of_trial",
    "outline",
    "override",
    "parse_setting",
    "save",
    "settings_of",
    "spaces",
]
