"""What an operator may set: environment variables `CONTROLPLANE_<SECTION>__<NAME>`, and `DATABASE_URL`.

`Settings.load` is given the environment and either returns everything, typed and immutable, or raises a SettingsError
that names every wrong key. Only the roof reads settings; rooms are given small option objects made of them.
"""

from controlplane.settings.environment import Fault, Settings, SettingsError, Variable, variables

__all__ = ["Fault", "Settings", "SettingsError", "Variable", "variables"]
