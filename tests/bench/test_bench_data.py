"""The benchmark of the data pipeline leaves its rows, and a picture of them."""

import json
import sysconfig
from pathlib import Path

from nsa_train.bench.data import main


def test_every_part_of_the_pipeline_has_a_row_and_a_picture(tmp_path):
    texts = [(Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8") for name in ("queue", "heapq")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in 4 * texts))
    words = ["data=files", f"data.root={tmp_path}", "data.paths=[text.jsonl]", f"data.prepared_dir={tmp_path}/p"]
    sizes = ["--documents", "2000", "--tokens", "400000", "--out", str(tmp_path / "out")]
    assert main([*words, "model.vocab=512", *sizes]) == 0
    result = json.loads((tmp_path / "out" / "data.json").read_text())
    assert {row["unit"] for row in result["rows"]} == {"s", "share", "tokens/s", "characters/s"}
    assert all(row["cores"] == 1 and row["value"] > 0 for row in result["rows"])
    packed = [row["value"] for row in result["rows"] if row["what"].endswith(": utilisation")]
    assert len(packed) == 9
    assert all(0.9 < value <= 1 for value in packed)
    assert (tmp_path / "out" / "data.png").read_bytes()[:4] == b"\x89PNG"
