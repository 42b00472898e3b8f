"""Make the site's pages: the guides, and one page for each method from its card, docstring, settings and scoreboard entry."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

from limbeck import catalogue
from limbeck.core.config import fields_of
from limbeck.report.scoreboard import ground_of

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "docs"


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "methods").mkdir(parents=True)
    readme = (ROOT / "README.md").read_text().replace("docs/report.png", "report.png")
    readme = readme.replace("`CONTRIBUTING.md`", "[Contributing](contributing.md)").replace(
        "`benchmarks/README.md`", "[Benchmarks](benchmarks.md)"
    )
    readme = re.sub(r"\[([\w-]+)\]\(limbeck/methods/[\w/]+\.py\)", r"[\1](methods/\1.md)", readme)
    (OUT / "index.md").write_text(readme)
    for source, name in (
        ("CONTRIBUTING.md", "contributing.md"),
        ("CHANGELOG.md", "changelog.md"),
        ("benchmarks/README.md", "benchmarks.md"),
    ):
        (OUT / name).write_text((ROOT / source).read_text())
    shutil.copy(ROOT / "docs" / "report.png", OUT / "report.png")
    for card in catalogue.cards().values():
        (OUT / "methods" / f"{card.name}.md").write_text(page(card))
    lines = ["# Methods", ""]
    for family, meaning in catalogue.FAMILIES.items():
        cards = list(catalogue.of_family(family))
        if cards:
            lines += [
                f"## {family}: {meaning}",
                "",
                *(f"- [{c.name}](methods/{c.name}.md): {c.summary}" for c in cards),
                "",
            ]
    (OUT / "methods.md").write_text("\n".join(lines))


def page(card: catalogue.Card) -> str:
    cls: Any = card.load()
    parts = [f"# {card.title}", f"`{card.name}`, from *{card.paper}* ({card.year}). {card.summary}"]
    parts += [f"**Needs** {card.needs}. **Gives** {card.gives}.", f"    limbeck run {card.name}"]
    parts += ["## What it does", "```text\n" + inspect.cleandoc(cls.__doc__ or "") + "\n```"]
    parts += ["## Settings", settings(cls)]
    for name, target in card.classes().items():
        if target != card.implementation:
            also: Any = catalogue.load_class(target)
            parts += [f"## Also: `{name}`", "```text\n" + inspect.cleandoc(also.__doc__ or "") + "\n```"]
    parts += ["## Its claim", card.claim, verdict(card.name)]
    return "\n\n".join(parts) + "\n"


def settings(cls: Any) -> str:
    paper = cls.Config.presets.get("paper", {})
    rows = ["| setting | type | range | default | paper | what |", "| --- | --- | --- | --- | --- | --- |"]
    for info in fields_of(cls.Config):
        said = (info.name, info.type, info.range, info.default, paper.get(info.name, ""), info.description)
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in said) + " |")
    return "\n".join(rows)


def verdict(name: str) -> str:
    path = ROOT / "scoreboard" / f"{name}.json"
    if not path.exists():
        return "Not measured."
    found = json.loads(path.read_text())
    rows = ["| check | mean difference | 95 % interval | verdict |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {c['statement']} | {c['mean']:+.4f} | [{c['low']:+.4f}, {c['high']:+.4f}] | {c['verdict']} |"
        for c in found["checks"]
    ]
    size = (
        f", {found['data']['train']} training samples" if "train" in found["data"] else ""
    )  # several data sets have none
    where = f"{ground_of(found['data'])}{size}, {len(found['seeds'])} seeds"
    return f"**{found['verdict']}** on {where}.\n\n" + "\n".join(rows) + f"\n\n{found['note']}"


if __name__ == "__main__":
    main()
