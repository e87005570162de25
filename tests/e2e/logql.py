"""LogQL by its looks: there is no Loki to ask, and a query that one would refuse shall be seen all the same."""

from __future__ import annotations

import re

_STRING = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`')
_MATCHERS = re.compile(r'\s*\w+\s*(?:=~|!~|!=|=)\s*""\s*(?:,\s*\w+\s*(?:=~|!~|!=|=)\s*""\s*)*,?\s*')
_STAGES = {
    "decolorize",
    "drop",
    "json",
    "keep",
    "label_format",
    "line_format",
    "logfmt",
    "pattern",
    "regexp",
    "unpack",
    "unwrap",
}


def logql_faults(text: str) -> list[str]:
    """What Loki would refuse, as far as it can be seen without one: brackets, selectors, stages."""
    found = []
    said = [match[0] for match in re.finditer(r'=~?\s*"((?:\\.|[^"\\])*)"', text) if match[1]]
    bare = _STRING.sub('""', text)
    if bare.count('"') % 2 or "`" in bare:
        found.append("a text does not end")
    for opening, closing in ("()", "{}", "[]"):
        if bare.count(opening) != bare.count(closing):
            found.append(f"{opening} and {closing} do not pair")
    selectors = re.findall(r"\{([^}]*)\}", bare)
    if not selectors:
        found.append("no stream is selected")
    found += [f"{{{one}}} is no selector" for one in selectors if not _MATCHERS.fullmatch(one)]
    if selectors and not said:
        found.append("a selector needs a matcher that does not match the empty text")
    for stage in re.findall(r"\|\s*(?![=~>])(\w+)(\s*(?:[=!<>]=?~?|\()?)", bare):
        if stage[0] not in _STAGES and not stage[1].strip():
            found.append(f"| {stage[0]} is no stage")
    return found
