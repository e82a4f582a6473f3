"""The settings of a run as one frozen value.

`load_settings` reads a YAML file and the command line into a `Settings`, `settings_from` takes Python values. Neither imports
torch, so a mistake in the file is reported at once. arguments.py turns settings into TRL's `SFTConfig`.
"""

from qriemann.config.settings import Settings, describe_keys, load_settings, settings_from

__all__ = ["Settings", "describe_keys", "load_settings", "settings_from"]
