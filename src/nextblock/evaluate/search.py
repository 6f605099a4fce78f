"""Find similar images by the cosine similarity of their features, one vector per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows

from nextblock.data import Source
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import MODEL, Evaluation, evaluation
from nextblock.evaluate.features import pooled
from nextblock.evaluate.knn import nearest_neighbours
from nextblock.evaluate.results import Result
from nextblock.evaluate.settings import SearchSettings
from nextblock.logs import counted
from nextblock.settings import from_dict
from nextblock.tables import Column, number

MAX_QUERIES = 64
SAME = 1 - 1e-5
"""An image at least this similar may be the query itself; pixels decide."""
SHEET = "sheet.png"

COLUMNS = (
    Column("query", "query"),
    Column("rank", "rank"),
    number("similarity", "similarity", ".4f"),
    Column("name", "image", lambda name, row: name + (" (the query itself)" if row["is_query"] else "")),
    Column("class", "class"),
)


def search(**settings: Any) -> Result:
    """Find the images nearest to each query; `settings` are the fields of `SearchSettings`.

    Rows: query, rank (from 1), index and name of the image, similarity (cosine), class, is_query (whether it
    is the query itself). With `out`, also draws a sheet of thumbnails.
    """
    config = from_dict(SearchSettings, settings)
    with evaluation(config) as opened:
        sources = {name: opened.open_source(getattr(config, name)) for name in ("data", "query")}
        if len(sources["query"]) > MAX_QUERIES:
            raise UsageError(
                f"{config.query} has {counted(len(sources['query']), 'image')}; give at most {MAX_QUERIES}"
            )

        def draw(out: Path, result: Result) -> None:
            from nextblock.visualize.evaluation import draw_contact_sheet

            draw_contact_sheet(result.rows, sources["query"], sources["data"], out / SHEET)

        return opened.result("search", sources, COLUMNS, lambda: _measure(opened, config, sources), save=draw)


def _measure(opened: Evaluation, config: SearchSettings, sources: dict[str, Source]) -> Result:
    wanted = [pooled(config, opened.model.config.depth)]
    tables = {purpose: opened.table(purpose, source, MODEL, wanted) for purpose, source in sources.items()}
    numbers = {purpose: table.readable() for purpose, table in tables.items()}
    features = F.normalize(tables["data"].read(numbers["data"]).to(opened.device), dim=-1)
    query_features = tables["query"].read(numbers["query"]).to(opened.device)
    # One more, because the first may be the query itself.
    nearest = nearest_neighbours(query_features, features, config.top + 1)
    source, queries, rows = sources["data"], sources["query"], []
    for i, query in enumerate(numbers["query"].tolist()):
        kept = 0
        neighbours = zip(nearest.similarity[i].tolist(), nearest.rows[i].tolist(), strict=True)
        for rank, (similarity, row) in enumerate(neighbours, start=1):
            index = int(numbers["data"][row])
            is_query = similarity > SAME and torch.equal(queries.read(query), source.read(index))
            kept += not is_query
            if kept > config.top:
                break
            rows.append(
                {
                    "query": queries.name(query),
                    "query_index": query,
                    "rank": rank,
                    "index": index,
                    "name": source.name(index),
                    "similarity": similarity,
                    "class": source.class_names[source.labels[index]] if source.has_labels else None,
                    "is_query": is_query,
                }
            )
    searched = counted(len(numbers["data"]), "image")
    notes = [f"{searched} of {source.spec} searched."]
    if config.out is not None:
        notes.append(f"Sheet: {Path(config.out) / SHEET}")
    return Result(
        verb="search", rows=tuple(rows), notes=tuple(notes), facts={"bad_images": opened.bad_counts()}
    )
