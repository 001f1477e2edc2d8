"""Write a small folder of clients whose questions of easy-VQA are unevenly spread.

    python benchmarks/uneven_questions.py OUT
    fedtune simulate --preset vqa --data OUT --rounds 4 --set train.steps=6

Four sites by dirichlet:0.3 with 200 questions each, 150 common test questions, and the public
captions that a connector is pretrained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedtune.data import PartitionSpec
from fedtune.data.easy_vqa import load_easy_vqa
from fedtune.data.questions import QuestionExamples

SITES, TRAINED, TESTED = 4, 200, 150


def main(folder: Path) -> None:
    """Write `folder`, as `data.source` takes it."""
    spec = PartitionSpec.parse("dirichlet:0.3")
    data = load_easy_vqa(partition=spec, clients=SITES, seed=0, min_size=TESTED)

    def write(name: str, examples: QuestionExamples, count: int) -> None:
        _write(
            folder / name,
            [
                {
                    "question": examples.questions[row],
                    "answer": data.answers[examples.labels[row]],
                    "image": str(examples.files[examples.images[row]]),
                }
                for row in range(count)
            ],
        )

    for place, client in enumerate(data.clients):
        write(f"site-{place}/train.jsonl", client.train, TRAINED)
    write("test.jsonl", data.test, TESTED)
    public = zip(data.public.files, data.public.words, strict=True)
    captions = [{"image": str(file), "caption": " ".join(words)} for file, words in public]
    _write(folder / "captions.jsonl", captions)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
