"""Pictures for the host's template browser: ``python run.py python workshop/thumbnails.py`` runs every workflow and writes its ``.jpg``.

Names of workflows after it: these alone. Those that need model files run with the demo model instead.
"""

from __future__ import annotations

import io
import json
import sys

from PIL import Image
from tqdm import tqdm

from lodestar.pictures import sheets
from workshop import api, stand_in
from workshop.compare import WORKFLOWS
from workshop.serving import server

SIDE = 384
CURVES = ("report",)  # workflows that are about their last picture, not the first


def main() -> None:
    """Write all thumbnails."""
    with server() as url:
        client = api.Client(url)
        chosen = [WORKFLOWS / f"{name}.json" for name in sys.argv[1:]] or sorted(WORKFLOWS.glob("*.json"))
        for path in tqdm(chosen, unit="workflow"):
            prompt = api.to_prompt(json.loads(path.read_text(encoding="utf-8")), client.node_types)
            if stand_in.needs_files(prompt):
                stand_in.stand_in(prompt)
            outputs = client.run(prompt)
            node = sorted(api.find(prompt, "PreviewImage"), key=int)[-1 if path.stem in CURVES else 0]
            pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in client.images(outputs[node])]
            sheets.tiled(pictures, SIDE).save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
