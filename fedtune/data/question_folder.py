"""Questions about images of many clients, from a folder that a person has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.data.naming import listed, sorted_names
from fedtune.data.question_files import ANSWER, read_asked, read_captions, read_questions
from fedtune.data.questions import Captions, FederatedQuestions, QuestionClient
from fedtune.data.readers import READERS, read_cells
from fedtune.errors import DataError


def load_question_folder(
    folder: Path, answers: Sequence[str] = (), min_size: int = 1
) -> FederatedQuestions:
    """A folder with `NAME/train.csv` for each client, a `test.csv`, and what is public.

    Files of questions as in `read_questions`; also as JSON lines or Parquet. `answers` are all that
    may occur; empty: those that do, sorted. Public may be `captions.csv`, as in `read_captions`,
    without which a connector must be given, and `public.csv` with a column `question`, of which an
    emulator is made. Raises `DataError`.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder with one sub-folder per client")
    files = {
        entry.name: file
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".") and (file := _find(entry, "train"))
    }
    test = _find(folder, "test")
    if not files or test is None:
        lacking = "test.csv" if files else "sub-folder with a train.csv"
        raise DataError(f"{folder} has no {lacking}; it needs NAME/train.csv and test.csv")
    known = tuple(answers) or _answers([*files.values(), test])
    clients = tuple(
        QuestionClient(name, read_questions(file, known)) for name, file in files.items()
    )
    for client in clients:
        if len(client.train) < min_size:
            raise DataError(
                f"{files[client.name]} has {len(client.train)} rows, fewer than "
                f"data.min-examples = {min_size}; remove the client or lower the minimum"
            )
    captions, asked = _find(folder, "captions"), _find(folder, "public")
    tested = read_questions(test, known)
    return FederatedQuestions(
        known,
        clients,
        tested,
        read_captions(captions) if captions else Captions((), ()),
        (),
        f"{folder}: {len(clients)} client folders with {sum(len(c.train) for c in clients):,} "
        f"training questions, {len(tested):,} for testing, {len(known)} answers",
        read_asked(asked) if asked else (),
    )


def _find(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{kind}" for kind in READERS if (folder / f"{stem}{kind}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has {listed([f.name for f in found])}; keep one of them")
    return found[0] if found else None


def _answers(files: Sequence[Path]) -> tuple[str, ...]:
    """All that occur; what is wrong with a cell is said when its row is read."""
    cells = [cell for file in files for _, (cell,) in read_cells(file, [ANSWER])]
    return sorted_names(cell for cell in cells if isinstance(cell, str) and cell.strip())
