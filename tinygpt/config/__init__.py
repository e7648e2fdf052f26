"""Define what a run may be asked for: the schema, its errors, and names that are no keys."""

from tinygpt.config.errors import ConfigError as ConfigError
from tinygpt.config.errors import RunError as RunError
from tinygpt.config.errors import first_line as first_line
from tinygpt.config.errors import install as install
from tinygpt.config.errors import is_out_of_memory as is_out_of_memory
from tinygpt.config.errors import one_line as one_line
from tinygpt.config.names import REMOVED as REMOVED
from tinygpt.config.schema import *  # noqa: F403
from tinygpt.config.settings import *  # noqa: F403
