"""The sentences of the demo's page: those of `texts.yaml`, with what was found in them."""

from pathlib import Path
from typing import Any

from dreamreader.demo.result import DemoResult, share
from dreamreader.specs.load import read_content
from dreamreader.zoo import scenes


def read_texts(result: DemoResult) -> dict[str, Any]:
    """The page's sentences, by section and what they are for."""
    recorded, colors, best = result.jobs["record"]["rows"], len(scenes.COLORS), result.best
    ceiling = share(result.test.of("target_prompt"), "kept").value
    facts = {
        "source": result.plan.source,
        "target": result.plan.target,
        "keep": f"{100 * result.plan.keep:.0f}",
        "place": best.cell.name,
        "time": best.cell.time,
        "strength": f"{best.strength:g}",
        "chosen_on": len(best.rows),
        "finalists": len(result.finalists),
        "held_out": len(result.test.of("edited")),
        "ceiling": f"{100 * ceiling:.0f} %",
        "dosed": len(result.dose.of("unedited")),
        "pairs": len(result.grid.rows),
        "fitted": recorded // colors,
        "colors": colors,
        "chance": f"{100 * (colors - 1) / (recorded - 1):.0f}",
        "sites": len(result.means.sites),
        "steps": len(result.means.explained(result.means.sites[0])),
    }

    def fill(text: Any) -> Any:
        if isinstance(text, dict):
            return {name: fill(each) for name, each in text.items()}
        return text.format(**facts)

    return fill(read_content(Path(__file__).with_name("texts.yaml"))[0])
