"""Job scripts: a template of `sbatch/` and a replica's spec make the text that Slurm runs.

Templates are Jinja2 with one rule that no author can forget: whatever an expression yields is escaped for the shell,
character by character, so that it is a single literal word there and stays harmless even inside quotes. A list becomes
several words. Values that no script can hold (line breaks, control characters) are refused before anything is rendered,
with the field named. The replica's secret is in the job's environment only, never in the script or in an argument.

A template is `NAME.sbatch`, looked for in the site's own directories first and then among those shipped; those whose
names begin with `_` are only there to be extended. A template can use:

    name, model, port                                  of the replica: its name, the served model's name, its port
    image, model_path, args, load_seconds              as in the spec's `vllm`
    environment_names                                  of the variables in the spec's `vllm`, but PATH
    nodes, gpus_per_node                               as in the spec's `slurm`
    master_port                                        where the ranks of one replica meet, on its first node
    probe                                              as in the spec
    python, shutdown_timeout_seconds                   as in `ScriptOptions`
    require(condition, field, remedy)                  refuses the spec unless the condition holds
    `is absolute`, `is bindable`                       tests for paths
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jinja2

from controlplane.core.types import ReplicaSetSpec
from controlplane.slurm.errors import foreign_text

SECRET_VARIABLE: Final = "VLLM_API_KEY"  # noqa: S105 -- a name
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_SHIPPED: Final = (
    Path(__file__).resolve().parents[2] / "sbatch",  # a checkout
    Path(sys.prefix) / "share" / "controlplane" / "sbatch",  # an installed package
)
_OWNED_OPTIONS: Final = (  # the control plane sets these, or relies on their not being set
    "--api-key",
    "--headless",
    "--host",
    "--master-addr",
    "--master-port",
    "--model",
    "--nnodes",
    "--node-rank",
    "--port",
    "--root-path",
    "--served-model-name",
    "--shutdown-timeout",
    "--ssl-certfile",
    "--ssl-keyfile",
    "--uds",
)
_OWNED_SHORT_OPTIONS: Final = {"-n": "--nnodes", "-r": "--node-rank"}
_MASTER_PORT_DISTANCE: Final = 10_000
_OWNED_VARIABLES: Final = re.compile(r"SLURM|(APPTAINERENV_|SINGULARITYENV_)?VLLM_API_KEY$")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TEMPLATE: Final = re.compile(r"[a-z0-9][a-z0-9-]*")
_NEEDS_ESCAPE: Final = re.compile(r"[^\w./:@%+,-]")


class ScriptError(Exception):
    """A spec cannot be made into a script. `field` is the spec's field at fault, `remedy` says what it must be."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(f"{field}: {remedy}")
        self.field = field
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class ScriptOptions:
    """How scripts are made at this site."""

    template_directories: tuple[Path, ...] = ()
    python: str = sys.executable  # for templates that run a module of this package
    shutdown_timeout_seconds: int = 30  # what a server told to stop may use to finish requests


@dataclass(frozen=True, slots=True)
class Script:
    """What a job runs: the text, and its whole environment, with the secret in it."""

    text: str
    environment: Mapping[str, str] = field(repr=False)


def render(spec: ReplicaSetSpec, *, name: str, port: int, secret: str, options: ScriptOptions) -> Script:
    """The script of one replica. Raises `ScriptError`, which names the field at fault."""
    if spec.slurm is None:
        raise ScriptError("slurm", "must be given: a set of fixed endpoints has no jobs")
    values: dict[str, Any] = {
        "name": name,
        "model": spec.model,
        "port": port,
        "image": spec.vllm.image,
        "model_path": spec.vllm.model_path,
        "args": spec.vllm.args,
        "load_seconds": spec.vllm.load_seconds,
        "nodes": spec.slurm.nodes,
        "gpus_per_node": spec.slurm.gpus_per_node,
        "master_port": master_port(port),
        "probe": spec.probe,
        "environment_names": tuple(variable for variable in spec.vllm.environment if variable != "PATH"),
        "python": options.python,
        "shutdown_timeout_seconds": options.shutdown_timeout_seconds,
    }
    environment = {"PATH": _PATH, **spec.vllm.environment, SECRET_VARIABLE: secret}
    _check_variables(spec.vllm.environment)
    _check_args(spec.vllm.args)
    for field_name, text in _texts(spec, name, secret, options):
        if any(character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in text):
            raise ScriptError(field_name, "must not hold line breaks or other control characters")
    return Script(_rendered(spec.template, values, options), environment)


def master_port(port: int) -> int:
    """Where the ranks of the replica that listens on `port` meet.

    Below the ports that systems give to outgoing connections. Two live replicas have the same only if the range of
    replicas' ports is wider than the distance: then one of them fails, and is replaced.
    """
    return port - _MASTER_PORT_DISTANCE if port - _MASTER_PORT_DISTANCE >= 1024 else port + _MASTER_PORT_DISTANCE


def check(spec: ReplicaSetSpec, options: ScriptOptions | None) -> None:
    """Raise `ScriptError` now if no script can be made of the spec, which would fail each of its submits.

    A set of fixed endpoints needs none. `options` is None where no Slurm is configured: then it must be such a set.
    """
    if spec.is_external:
        return
    if options is None:
        raise ScriptError("slurm", "CONTROLPLANE_SLURM__URL is not set; set it, or give endpoints instead")
    render(spec, name=f"cp-{spec.name}-0", port=1024, secret="", options=options)


def _rendered(template_name: str | None, values: Mapping[str, Any], options: ScriptOptions) -> str:
    directories = [*options.template_directories, *_SHIPPED]
    loader = jinja2.FileSystemLoader([str(directory) for directory in directories])
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        finalize=_shell_words,
        autoescape=False,  # noqa: S701 -- the output is a shell script: `finalize` escapes for the shell
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["require"] = _require
    environment.tests["absolute"] = _is_absolute
    environment.tests["bindable"] = _is_bindable
    if template_name is None or not _TEMPLATE.fullmatch(template_name):
        raise ScriptError("template", "must be a template's name: small letters, digits and dashes")
    try:
        text = environment.get_template(f"{template_name}.sbatch").render(values)
    except jinja2.TemplateNotFound as error:
        known = sorted(name.removesuffix(".sbatch") for name in loader.list_templates() if _is_offered(name))
        remedy = f"no template {error.name} in {', '.join(map(str, directories))}; there are: {', '.join(known)}"
        raise ScriptError("template", remedy) from None
    except jinja2.TemplateError as error:
        raise ScriptError("template", foreign_text(f"{template_name} is not right: {error}")) from None
    if not text.startswith("#!"):
        raise ScriptError("template", f"{template_name} does not begin with #!, so that Slurm could not run it")
    return text


def _is_offered(file_name: str) -> bool:
    return file_name.endswith(".sbatch") and _TEMPLATE.fullmatch(file_name.removesuffix(".sbatch")) is not None


# --- what templates can use -----------------------------------------------------------------------------


def _shell_words(value: object) -> str:
    """What an expression of a template yields, as shell words that mean exactly it.

    Escaped by backslashes rather than by quotes: an author who puts the expression inside quotes gets stray backslashes
    then, but never a command run.
    """
    if isinstance(value, str):
        return _NEEDS_ESCAPE.sub(r"\\\g<0>", value) or "''"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return " ".join(_shell_words(item) for item in value)
    # str() of an undefined value raises, and says which one it is
    raise ScriptError("template", foreign_text(f"a {type(value).__name__} cannot stand in a script: {value!s}"))


def _require(condition: object, field: str, remedy: str) -> None:
    if not condition:
        raise ScriptError(field, remedy)


def _is_absolute(path: object) -> bool:
    return isinstance(path, str) and path.startswith("/")


def _is_bindable(path: object) -> bool:
    """Whether apptainer can be told to mount `path`: its `--bind` is a list of lists, and nothing escapes in it."""
    return _is_absolute(path) and not set(str(path)) & set(':,"\\')


# --- what no template could make good -------------------------------------------------------------------


def _texts(spec: ReplicaSetSpec, name: str, secret: str, options: ScriptOptions) -> Iterator[tuple[str, str]]:
    """Every text that gets into a script or its environment, with the field it comes from."""
    yield "name", name
    yield "model", spec.model
    yield "secret", secret
    yield "python", options.python
    yield "vllm.image", spec.vllm.image or ""
    yield "vllm.model_path", spec.vllm.model_path or ""
    for index, argument in enumerate(spec.vllm.args):
        yield f"vllm.args[{index}]", argument
    for variable, value in spec.vllm.environment.items():
        yield f"vllm.environment.{variable}", value


def _check_variables(variables: Mapping[str, str]) -> None:
    for variable in variables:
        if not _VARIABLE.fullmatch(variable):
            raise ScriptError("vllm.environment", f"{foreign_text(variable)!r} is no name of a variable")
        if _OWNED_VARIABLES.match(variable):
            raise ScriptError(f"vllm.environment.{variable}", "is set for every job and cannot be given")


def _check_args(args: tuple[str, ...]) -> None:
    """Refuse options that are ours, in every spelling vLLM takes: with `=`, with underscores, shortened."""
    for index, argument in enumerate(args):
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--"):
            owned = next((known for known in _OWNED_OPTIONS if known.startswith(option)), None)
        else:
            owned = _OWNED_SHORT_OPTIONS.get(option.rstrip("0123456789"))
        if owned is not None:
            raise ScriptError(f"vllm.args[{index}]", f"{owned} is set by the control plane and cannot be given")
