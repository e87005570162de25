"""The shipped boards: made from their source, complete in what they say, and asking only for what there is."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from controlplane.cli import cli
from controlplane.demo.children import program
from grafana.dashboards.source.__main__ import files, main
from grafana.dashboards.source.board import COLUMNS, FLEET, GPU_NODES, REPLICA, TENANTS, TITLES, Board
from grafana.dashboards.source.gpu_nodes import FATAL_XIDS
from grafana.dashboards.source.panels import Answer, single
from grafana.dashboards.source.queries import now
from tests.unit.boards import (
    DOCUMENTS,
    FOLDER,
    RECORDED,
    ROOT,
    SOURCES,
    UNITS,
    asked,
    commands,
    every_panel,
    exposed,
    known_metrics,
    metrics_of,
    panels,
    promql,
    without_variables,
)

SOURCE_OF_TYPE = {kind: "${" + name + "}" for name, kind in SOURCES.items()}
RULES = ROOT / "prometheus" / "rules.yaml"
SEEN_WITHOUT_SCROLLING = 26  # rows of the grid at 1920 x 1080


def test_every_board_is_what_its_source_makes() -> None:
    made = {path.stem: content for path, content in files().items()}
    assert made.keys() == DOCUMENTS.keys()
    stale = [uid for uid, content in made.items() if (FOLDER / f"{uid}.json").read_text() != content]
    assert not stale, "run `make dashboards`"
    assert main(["--check"]) == 0


@pytest.mark.parametrize("uid", DOCUMENTS)
def test_a_board_has_a_stable_uid_a_title_and_nothing_that_provisioning_cannot_fill_in(uid: str) -> None:
    document = DOCUMENTS[uid]
    assert document["uid"] == uid
    assert len(uid) <= 40
    assert document["title"] == TITLES[uid]
    assert document["description"].endswith("?")
    assert document["tags"] == ["controlplane"]
    assert document["schemaVersion"] in (41, 42)
    assert not [key for key in document if key.startswith("__")]
    assert "id" not in document  # Grafana gives one


@pytest.mark.parametrize("uid", DOCUMENTS)
def test_a_board_asks_data_sources_that_its_variables_name(uid: str) -> None:
    document = DOCUMENTS[uid]
    variables = {one["name"]: one for one in document["templating"]["list"]}
    for name, kind in SOURCES.items():
        assert (variables[name]["type"], variables[name]["query"]) == ("datasource", kind)
    assert not [one["name"] for one in variables.values() if not one.get("description") or not one["label"]]
    for panel in panels(document):
        if panel["type"] != "text":
            assert panel["targets"], panel["title"]
            sources = [target["datasource"] for target in panel["targets"]]
            assert all(one["uid"] == SOURCE_OF_TYPE[one["type"]] for one in sources), panel["title"]
            mixed = len({one["uid"] for one in sources}) > 1
            assert panel["datasource"]["uid"] == ("-- Mixed --" if mixed else sources[0]["uid"]), panel["title"]
            assert len({target["refId"] for target in panel["targets"]}) == len(sources), panel["title"]


@pytest.mark.parametrize("uid", DOCUMENTS)
def test_every_variable_that_is_named_is_one_of_the_board(uid: str) -> None:
    document = DOCUMENTS[uid]
    known = {one["name"] for one in document["templating"]["list"]}
    text = json.dumps({key: document[key] for key in ("panels", "annotations", "templating", "links")})
    used = {one for pair in re.findall(r"\$\{(\w+)[:}]|\$(?![{_])([a-z]\w*)", text) for one in pair if one}
    assert {one for one in used if not one.startswith("__")} <= known


def test_every_panel_says_what_it_shows_in_which_unit_and_what_it_means_when_there_is_nothing() -> None:
    for place, panel in every_panel():
        defaults = panel["fieldConfig"]["defaults"]
        assert len(panel["title"]) <= 60, place
        assert len(panel["description"]) > 20, place
        assert panel["description"].endswith((".", "?")), place
        assert defaults["unit"] in UNITS or defaults["unit"].startswith("suffix:"), place
        assert defaults["noValue"], place
        assert defaults["thresholds"]["steps"][0]["value"] is None, place
        bounds = [step["value"] for step in defaults["thresholds"]["steps"][1:]]
        assert bounds == sorted(bounds), place
        properties = [one for each in panel["fieldConfig"]["overrides"] for one in each["properties"]]
        assert {one["value"] for one in properties if one["id"] == "unit"} <= UNITS, place


@pytest.mark.parametrize("uid", DOCUMENTS)
def test_panels_have_ids_of_their_own_and_fill_the_grid_without_overlap(uid: str) -> None:
    document = DOCUMENTS[uid]
    ids = Counter(panel["id"] for panel in document["panels"])
    assert set(ids.values()) == {1}
    taken: dict[tuple[int, int], str] = {}
    for panel in document["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert 0 <= x < COLUMNS
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    height = 1 + max(y for _, y in taken)
    assert len(taken) == COLUMNS * height, "there is a hole"


@pytest.mark.parametrize("uid", DOCUMENTS)
def test_what_matters_is_seen_without_scrolling(uid: str) -> None:
    shown = [
        one for one in panels(DOCUMENTS[uid]) if one["gridPos"]["y"] + one["gridPos"]["h"] <= SEEN_WITHOUT_SCROLLING
    ]
    kinds = {one["type"] for one in shown}
    assert "stat" in kinds
    assert "timeseries" in kinds or "state-timeline" in kinds
    assert len(shown) >= 10


def test_links_lead_to_boards_that_there_are_and_set_variables_that_these_have() -> None:
    for uid, document in DOCUMENTS.items():
        led = [link["url"] for link in document["links"]]
        assert led == [f"/d/{other}" for other in TITLES if other != uid]
        assert all(link["includeVars"] and link["keepTime"] for link in document["links"])
    for place, panel in every_panel():
        links = [*panel["fieldConfig"]["defaults"].get("links", [])]
        for each in panel["fieldConfig"]["overrides"]:
            links += [link for one in each["properties"] if one["id"] == "links" for link in one["value"]]
        for link in links:
            board = re.match(r"/d/([\w-]+)\?", link["url"])
            assert board, f"{place}: {link['url']}"
            assert board[1] in TITLES, place
            assert "${__url_time_range}" in link["url"], place
            if board[1] in DOCUMENTS:
                known = {one["name"] for one in DOCUMENTS[board[1]]["templating"]["list"]}
                assert set(re.findall(r"var-(\w+)=", link["url"])) <= known, place


def test_cells_and_labels_in_links_are_there() -> None:
    for place, panel in every_panel():
        text = json.dumps([panel["fieldConfig"], panel.get("transformations")])
        queries = " ".join(target.get("expr", target.get("rawSql", "")) for target in panel["targets"])
        for name in re.findall(r"\$\{__(?:data\.fields|field\.labels)\.(\w+)", text):
            assert re.search(rf"\b{name}\b", queries), f"{place}: {name}"


def test_every_metric_is_one_that_somebody_exposes_with_the_labels_that_it_is_selected_by() -> None:
    known = known_metrics()
    for one in promql():
        found = metrics_of(one.text)
        assert found, one.place
        for name, labels in found.items():
            assert name in known, f"{one.place}: nobody exposes {name}"
            assert labels <= known[name] | {"job", "instance"}, f"{one.place}: {name}"


def test_every_result_is_aggregated_and_legends_name_labels_that_are_left() -> None:
    for one in promql():
        if ": $" in one.place:
            continue  # a variable's metric
        assert re.search(r"\b(sum|max|min|avg|count|topk|histogram_quantile|group)\b", one.text), one.place
        kept = {name for group in re.findall(r"\bby \(([^)]*)\)", one.text) for name in re.split(r",\s*", group)}
        assert set(re.findall(r"\{\{(\w+)\}\}", one.legend)) <= kept, one.place


def test_curves_take_rates_over_a_window_that_fits_the_zoom() -> None:
    for one in promql():
        windows = set(re.findall(r"\[([^\]]+)\]", re.sub(r'"[^"]*"', "", one.text)))
        fitting = {"$__rate_interval", "$__range"}
        assert one.is_instant or windows <= fitting, f"{one.place}: {windows}"


def test_promtool_understands_every_expression(tmp_path: Path) -> None:
    expressions = {one.place: one.text for one in promql()}
    rules = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__(rate_interval|range|interval)", "5m", text)}
        for number, text in enumerate(expressions.values())
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run = subprocess.run([program("promtool"), "check", "rules", path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_sql_reads_only_what_dashboards_may_read_and_only_as_much_as_is_shown() -> None:
    for one in asked():
        if one.kind == SOURCES["postgres"]:
            read = re.findall(r"\b(?:FROM|JOIN)\s+(?!LATERAL)([\w.]+)", one.text)
            assert read, one.place
            assert all(name.startswith("grafana.") for name in read), f"{one.place}: {read}"
            assert not re.search(r"\$(?!__|\{\w+:sqlstring\})", one.text), f"{one.place}: a value that is not quoted"
            assert not re.search(r"\bIN\s*\(\s*\$", one.text), (
                f"{one.place}: an error where nothing is chosen; see `chosen`"
            )
            assert not re.search(r"\b(INSERT|UPDATE|DELETE|CREATE|DROP|ALTER|GRANT|SET)\b", one.text), one.place


def test_no_board_has_a_secret_or_a_place_for_one() -> None:
    for uid, document in DOCUMENTS.items():
        text = json.dumps(document).lower()
        words = ("password", "api_key", "secret", "hmac", "sk-", "jwt", "credential", "private key")
        assert not [word for word in words if word in text], uid
        tokens = re.findall(r"authorization: \w+ \S+", text)
        assert all("$controlplane_token" in token for token in tokens), uid


def test_a_round_trip_through_grafanas_models_keeps_every_key() -> None:
    register_default_plugins()
    for uid, document in DOCUMENTS.items():
        again = json.loads(json.dumps(Dashboard.from_json(document), cls=JSONEncoder))
        assert _keys(document) - _keys(again) == set(), uid


def _keys(value: object, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {found for key, one in value.items() for found in {f"{path}.{key}", *_keys(one, f"{path}.{key}")}}
    if isinstance(value, list):
        return {found for number, one in enumerate(value) for found in _keys(one, f"{path}[{number}]")}
    return set()


def test_commands_for_operators_are_those_of_the_command_line() -> None:
    found = list(commands())
    for place, line in found:
        words = (
            re.sub(r"'\s*\|\|\s*[\w.()+ ]+(\s*\|\|\s*'|,|\))", " x ", line.split("#")[0]).replace("'", " ").split()[1:]
        )
        command = typer.main.get_command(cli)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, f"{place}: {line}"
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, f"{place}: {line}"
        needed = [one for one in command.params if one.param_type_name == "argument" and one.required]
        assert len([word for word in words if not word.startswith("-")]) >= len(needed), f"{place}: {line}"


def test_paths_for_operators_are_those_of_the_api() -> None:
    known = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]
    shapes = {re.sub(r"\{[^}]*\}", "{}", path): set(methods) for path, methods in known.items()}
    for place, panel in every_panel():
        for line in str(panel["options"].get("content", "")).splitlines():
            for path in re.findall(r"/api/v1/[\w${}/-]+", line):
                shape = re.sub(r"\$\{?\w+\}?", "{}", path)
                assert shape in shapes, f"{place}: {path}"
                assert ("post" if "POST" in line else "get") in shapes[shape], f"{place}: {line}"


def test_a_line_that_does_not_fill_the_grid_is_refused() -> None:
    panel = single(Answer("A", "What is there to be seen?", "short", "nothing"), now("sum(up)"), width=5)
    with pytest.raises(ValueError, match="do not fill"):
        Board(FLEET, "Is it?").line(4, panel)


@pytest.mark.parametrize("uid", DOCUMENTS)
def test_columns_without_a_width_are_left_room_to_be_read_at_1920_pixels(uid: str) -> None:
    for panel in DOCUMENTS[uid]["panels"]:
        if panel["type"] != "table":
            continue
        columns = [
            {one["id"]: one["value"] for one in override["properties"]}
            for override in panel["fieldConfig"]["overrides"]
            if override["matcher"]["id"] == "byName"
        ]
        widths = [column.get("custom.width", 0) for column in columns if not column.get("custom.hidden")]
        left = panel["gridPos"]["w"] * 1888 // 24 - 16 - sum(widths)
        assert left >= 100 * widths.count(0), f"{panel['title']}: {left} pixels for {widths.count(0)} columns"


def test_what_is_told_by_the_day_is_shown_whatever_hours_the_board_shows() -> None:
    by_day = [panel for panel in DOCUMENTS[TENANTS]["panels"] if panel["title"].endswith("by day and tenant")]
    assert by_day
    for panel in by_day:
        assert panel["timeFrom"] == "31d"
        assert panel["fieldConfig"]["defaults"]["custom"]["drawStyle"] == "bars", "a line needs two days"


def test_the_alarm_for_xids_knows_those_that_drain_a_node() -> None:
    rules = (ROOT / "grafana" / "alerts" / "drain-node.yaml").read_text()
    [panel] = [panel for panel in DOCUMENTS[GPU_NODES]["panels"] if panel.get("title") == "Fatal XIDs in 5 minutes"]
    assert f'xid=~"{FATAL_XIDS}"' in rules
    assert f'xid=~"{FATAL_XIDS}"' in panel["targets"][0]["expr"]


def test_two_panels_of_one_title_are_refused() -> None:
    board = Board(REPLICA, "Is it?")
    for _ in range(2):
        board.line(4, single(Answer("A", "What is there to be seen?", "short", "nothing"), now("sum(up)")))
    with pytest.raises(ValueError, match="another title"):
        board.document()


def test_provisioning_files_have_only_keys_that_grafana_reads() -> None:
    provider = yaml.safe_load((FOLDER / "provider.yaml").read_text())
    assert provider.keys() == {"apiVersion", "providers"}
    for one in provider["providers"]:
        assert one.keys() <= {
            *("name", "orgId", "folder", "type", "disableDeletion", "allowUiUpdates"),
            *("updateIntervalSeconds", "options"),
        }
        # no folderUid: the alert rules, which know their folder by its title only, may have made it
        assert one["type"] == "file"
        assert one["options"].keys() == {"path", "foldersFromFilesStructure"}
    sources = yaml.safe_load((FOLDER / "datasources.yaml").read_text())
    assert sources.keys() == {"apiVersion", "datasources"}
    defaults = {
        one["current"]["value"] for one in DOCUMENTS[FLEET]["templating"]["list"] if one["type"] == "datasource"
    }
    assert {one["uid"] for one in sources["datasources"]} == defaults
    for one in sources["datasources"]:
        assert one.keys() <= {
            *("name", "uid", "type", "access", "url", "user", "isDefault", "editable", "jsonData", "secureJsonData")
        }
        assert one["type"] in SOURCES.values()
        assert all(str(value).startswith("$") for value in one.get("secureJsonData", {}).values())


def check_samples(directory: Path, series: Mapping[str, str], values: Mapping[str, float]) -> None:
    """Feed series, a sample every 15 s, and expect of each expression one sample without labels after 15 minutes."""
    checks = [
        {"expr": expression, "eval_time": "15m", "exp_samples": [{"labels": "{}", "value": value}]}
        for expression, value in values.items()
    ]
    given = [{"series": name, "values": samples} for name, samples in series.items()]
    path = directory / "tests.yml"
    path.write_text(yaml.safe_dump({"tests": [{"interval": "15s", "input_series": given, "promql_expr_test": checks}]}))
    run = subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_expression_finds_something_where_everything_is_exposed(tmp_path: Path) -> None:
    # labels that do not meet, in a join or a selector, show here: such a panel would be empty for ever
    check_samples(tmp_path, exposed(), {f"count({without_variables(one.text)}) > bool 0": 1 for one in promql()})


def test_failed_requests_are_none_and_not_unknown_while_none_fail(tmp_path: Path) -> None:
    expressions = {one.place: without_variables(one.text) for one in promql()}
    none_fails = {'proxy_requests_total{model="m",tenant="t",code="200"}': "0+1x60"}
    places = (f"{FLEET}: Failed requests A", f"{FLEET}: Models I")
    check_samples(tmp_path, none_fails, {f"sum({expressions[place]})": 0 for place in places})


def test_two_control_planes_that_tell_the_same_do_not_count_twice(tmp_path: Path) -> None:
    expressions = {one.place: without_variables(one.text) for one in promql()}
    both: dict[str, str] = {}
    for instance in ("a:9100", "b:9100"):
        both |= {
            f'controlplane_replicas_desired{{instance="{instance}",replica_set="s",model="m"}}': "3x60",
            f'controlplane_replicas_routable{{instance="{instance}",replica_set="s",model="m"}}': "1x60",
            f'controlplane_gpus_held{{instance="{instance}",replica_set="s",model="m"}}': "4x60",
            f'controlplane_replicas{{instance="{instance}",replica_set="s",phase="RUNNING"}}': "2x60",
        }
    expected = {"Replicas missing A": 2, "GPUs held A": 4, "Desired and routable A": 3, "Replicas by phase A": 2}
    check_samples(
        tmp_path, both, {f"sum({expressions[f'{FLEET}: {place}']})": value for place, value in expected.items()}
    )


def test_recorded_series_are_those_of_the_rules() -> None:
    recorded = {
        rule["record"]: rule["expr"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    assert RECORDED.keys() <= recorded.keys()
    for name, labels in RECORDED.items():
        named = {label for part in re.findall(r"\bby \(([^)]*)\)", recorded[name]) for label in part.split(", ")}
        assert labels - {"xid"} <= named, name
