"""Prints the JSON Schema of the file."""

from __future__ import annotations

import json
import sys

from controlplane.specs.parsing import json_schema

sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
