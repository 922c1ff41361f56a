"""Old import paths, for one landing."""
from megatron_rl.model.architectures import parse_config, read_config  # noqa: F401
from megatron_rl.model.network import Network as BailingConfig  # noqa: F401
from megatron_rl.model.network import check_layout  # noqa: F401
from megatron_rl.model.slots import count_parameters, expected_shapes  # noqa: F401
