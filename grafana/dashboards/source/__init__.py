"""What the dashboards are made from: `python -m grafana.dashboards.source` writes the JSON files beside this package.

A board is a function that returns a `Board`, listed in `__main__.py`. Panels come from `panels.py`, their queries from
`queries.py`; neither lets a panel be made without title, description, unit, thresholds and a text for when there is
nothing. Grafana reads only the JSON; a test compares it with what is made here.
"""
