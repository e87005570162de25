"""The rules, as pure functions of values.

Nothing here awaits, reads a clock, logs or knows a setting: `now` and chance are arguments, and the standard
library is all that is imported. That is what lets the tests try every interrupted prefix of every plan.
"""
