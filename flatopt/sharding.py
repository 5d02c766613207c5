from .core.sharding import *  # noqa: F403
from .core.sharding import local_update as local_delta  # noqa: F401
