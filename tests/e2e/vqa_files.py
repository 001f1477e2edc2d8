"""A small federation of questions about images, as files."""

from __future__ import annotations

from pathlib import Path

from e2e_helpers import write_rows

SITES, QUESTIONS, TESTED, PUBLIC = 4, 36, 40, 48


def write_question_clients(folder: Path) -> Path:
    """Four sites with questions of easy-VQA, a test set, public captions and questions."""
    from fedtune.data import PartitionSpec
    from fedtune.data.easy_vqa import load_easy_vqa
    from fedtune.data.questions import QuestionExamples

    data = load_easy_vqa(partition=PartitionSpec("iid"), clients=SITES, seed=0)

    def rows(examples: QuestionExamples, number: int) -> list[dict[str, str]]:
        return [
            {
                "question": examples.questions[row],
                "answer": data.answers[examples.labels[row]],
                "image": str(examples.files[examples.images[row]]),
            }
            for row in range(number)
        ]

    for place, client in enumerate(data.clients):
        write_rows(folder / f"site-{place}" / "train.jsonl", rows(client.train, QUESTIONS))
    write_rows(folder / "test.jsonl", rows(data.test, TESTED))
    captions = [
        {"image": str(file), "caption": " ".join(words)}
        for file, words in zip(data.public.files[:PUBLIC], data.public.words, strict=False)
    ]
    write_rows(folder / "captions.jsonl", captions)
    write_rows(folder / "public.jsonl", [{"question": q} for q in data.public_questions[:PUBLIC]])
    return folder
