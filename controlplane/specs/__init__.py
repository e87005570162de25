"""The YAML files in which operators write replica sets, checked wholly before anything is applied.

`file_format` says what may be written, `parsing` makes core's types of it, `faults` tells people what to correct.
`python -m controlplane.specs` prints the JSON Schema that is published as `docs/replica-sets.schema.json`. What a job
script can hold, and what its template needs, is known to the templates and not here: `slurm.script.render`.
"""

from controlplane.specs.faults import Fault, SpecError, faults_of
from controlplane.specs.parsing import json_schema, parse_file, parse_one

__all__ = ["Fault", "SpecError", "faults_of", "json_schema", "parse_file", "parse_one"]
