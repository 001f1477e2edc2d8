"""A whole run through the real command, and everything it leaves behind, checked from outside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e_helpers import (
    Launcher,
    adapter_bytes,
    adapter_tensors,
    read_journal,
    read_metrics,
    read_rows,
    read_summary,
    tree,
    write_rows,
)
from numpy.typing import NDArray

RunMain = Callable[..., tuple[int, str, str]]
Finished = tuple[Path, str, str]
CONVERSATION = 6_000  # five exchanges: keys, shares and signatures of four clients
PLAIN = ("--set", "secagg.enabled=false")


def classify(model: Any, base: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """Logits `[texts, labels]`, one text at a time, without any of fedtune's batching."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model.eval()
    rows = []
    with torch.no_grad():
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
            rows.append(model(tokens["input_ids"], tokens["attention_mask"])[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def peft_logits(
    finished_run: Finished, tiny_base: Path, client_folders: Path
) -> NDArray[np.float32]:
    """What peft itself computes for the test set from the adapter folder of the finished run."""
    from peft import PeftModel

    from fedtune.base.classifier import load_classifier

    run, *_ = finished_run
    labels = json.loads((run / "adapter" / "passport.json").read_text())["labels"]
    model = PeftModel.from_pretrained(load_classifier(str(tiny_base), len(labels)), run / "adapter")
    texts = [row["text"] for row in read_rows(client_folders / "test.jsonl")]
    return classify(model, tiny_base, texts)


@pytest.fixture(scope="module")
def right(finished_run: Finished, client_folders: Path) -> NDArray[np.int64]:
    """The test set's labels as numbers in the order of the passport."""
    labels = json.loads((finished_run[0] / "adapter" / "passport.json").read_text())["labels"]
    return np.array([labels.index(r["label"]) for r in read_rows(client_folders / "test.jsonl")])


class TestRunFolder:
    def test_stdout_is_one_json_object_and_stderr_is_silent(self, finished_run: Finished) -> None:
        run, out, err = finished_run
        printed = json.loads(out)
        assert printed.pop("run") == "runs/clinics"
        assert printed == read_summary(run)
        assert err == ""

    def test_has_all_files_and_nothing_hidden(self, finished_run: Finished) -> None:
        names = {re.sub(r"tfevents\.[0-9]+$", "tfevents", name) for name in tree(finished_run[0])}
        assert names == {
            "config.toml",
            "journal.db",
            "journal.lock",
            "metrics.jsonl",
            "sites.db",
            "summary.json",
            "report.html",
            "tensorboard",
            "tensorboard/events.out.tfevents",
            "adapter",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "adapter/passport.json",
        }
        assert [path.name for path in finished_run[0].parent.iterdir()] == ["clinics"]

    def test_config_is_the_configuration_of_the_run(self, finished_run: Finished) -> None:
        import tomllib

        from fedtune.config import load_config

        config = tomllib.loads((finished_run[0] / "config.toml").read_text())
        assert config["train"]["steps"] == 6
        assert config["train"]["lr"] == 0.02
        assert config["rounds"]["count"] == 3
        summary = read_summary(finished_run[0])
        assert load_config(finished_run[0] / "config.toml").digest == summary["config_digest"]

    def test_metrics_say_what_the_journal_says(self, finished_run: Finished) -> None:
        metrics = read_metrics(finished_run[0])
        assert metrics == read_journal(finished_run[0])
        assert [row["round"] for row in metrics] == [1, 2, 3]
        assert all(
            row["clients"] == ["clinic-0", "clinic-1", "clinic-2", "clinic-3"] for row in metrics
        )
        assert all(row["failed"] == {} for row in metrics)

    def test_summary_has_the_keys_of_the_design(self, finished_run: Finished) -> None:
        summary, metrics = read_summary(finished_run[0]), read_metrics(finished_run[0])
        assert summary["status"] == "finished"
        assert summary["rounds"] == summary["planned_rounds"] == 3
        assert summary["final"] == {key: metrics[-1][key] for key in ("round", "loss", "accuracy")}
        assert summary["best"]["accuracy"] == max(row["accuracy"] for row in metrics)
        assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in metrics))
        assert summary["train_seconds"] == pytest.approx(sum(r["train_seconds"] for r in metrics))
        assert summary["references"] == []
        assert summary["epsilon"] is None
        assert 50 < summary["peak_rss_mb"] < 4000
        assert len(summary["config_digest"]) == 64
        assert [client["name"] for client in summary["per_client"]] == metrics[0]["clients"]
        assert [client["examples"] for client in summary["per_client"]] == [48, 40, 32, 24]
        assert all(client["rounds_completed"] == 3 for client in summary["per_client"])

    def test_it_learns(self, finished_run: Finished) -> None:
        metrics = read_metrics(finished_run[0])
        assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
        assert metrics[-1]["accuracy"] > 0.4  # of four labels

    def test_traffic_is_packed_integers_up_and_the_adapter_down(
        self, finished_run: Finished
    ) -> None:
        summary, metrics = read_summary(finished_run[0]), read_metrics(finished_run[0])
        parameters = summary["adapter_parameters"]
        assert parameters == sum(t.size for t in adapter_tensors(finished_run[0]).values())
        # Four clients of 16 bits: a sum takes 18, and so does each value of a client.
        bits = (2 * 4 * (2**15 - 1)).bit_length()
        up, down = bits * parameters // 8, 4 * parameters
        for row in metrics:
            assert 4 * up < row["bytes_up"] <= 4 * (up + CONVERSATION)
            assert 4 * down < row["bytes_down"] <= 4 * (down + CONVERSATION)
        assert up < summary["bytes_up_per_client_round"] <= up + CONVERSATION
        assert down < summary["bytes_down_per_client_round"] <= down + CONVERSATION
        assert summary["bytes_up"] == sum(row["bytes_up"] for row in metrics)

    def test_report_shows_the_run_and_asks_nothing_of_the_network(
        self, finished_run: Finished
    ) -> None:
        page = (finished_run[0] / "report.html").read_text()
        assert "clinic-3" in page
        # Names of XML vocabularies are no addresses that a browser would fetch.
        urls = set(re.findall(r"""(?:src|href)\s*=\s*["']?\s*([^"'>\s]+)""", page))
        assert not [url for url in urls if not url.startswith(("#", "data:"))]
        assert "@import" not in page
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", page)
        assert "<script src" not in page

    def test_tensorboard_reads_the_rounds(self, finished_run: Finished) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(finished_run[0] / "tensorboard"))
        events.Reload()
        found = [(event.step, event.value) for event in events.Scalars("eval/accuracy")]
        wanted = [(row["round"], row["accuracy"]) for row in read_metrics(finished_run[0])]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])

    def test_passport_says_where_the_adapter_comes_from(
        self, finished_run: Finished, tiny_base: Path
    ) -> None:
        from hashlib import sha256

        from safetensors.numpy import load_file

        from fedtune.base.resolve import digest_base

        run, *_ = finished_run
        passport = json.loads((run / "adapter" / "passport.json").read_text())
        summary = read_summary(run)
        assert passport["labels"] == summary["labels"]
        assert passport["base_digest"] == digest_base(tiny_base) == summary["base_digest"]
        assert passport["config_digest"] == summary["config_digest"]
        assert (passport["rounds"], passport["clients"]) == (3, 4)
        # The journal keeps the vector in the manifest's order; the file is in safetensors' own.
        import sqlite3

        with sqlite3.connect(run / "journal.db") as database:
            ((vector,),) = database.execute("SELECT adapter FROM rounds WHERE round = 3")
        assert passport["adapter_digest"] == sha256(vector).hexdigest()
        size = sum(
            tensor.size
            for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values()
        )
        assert len(vector) == 4 * size


class TestModel:
    """Accuracy, adapter, evaluation and export agree, judged by plain peft and transformers."""

    def test_peft_alone_finds_the_accuracy_of_the_summary(
        self,
        finished_run: Finished,
        peft_logits: NDArray[np.float32],
        right: NDArray[np.int64],
    ) -> None:
        summary = read_summary(finished_run[0])
        accuracy = float((peft_logits.argmax(1) == right).mean())
        assert summary["final"]["accuracy"] == accuracy
        shifted = peft_logits - peft_logits.max(1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(right)), right]
        assert summary["final"]["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)

    def test_own_mix_accuracy_is_recall_weighted_by_the_client(
        self, finished_run: Finished, peft_logits: NDArray[np.float32], right: NDArray[np.int64]
    ) -> None:
        hits = peft_logits.argmax(1) == right
        recall = np.array([hits[right == label].mean() for label in range(4)])
        for client in read_summary(finished_run[0])["per_client"]:
            wanted = float(np.average(recall, weights=client["label_counts"]))
            assert client["own_mix_accuracy"] == pytest.approx(wanted)

    def test_eval_gives_the_same(
        self, finished_run: Finished, client_folders: Path, run_main: RunMain
    ) -> None:
        run, *_ = finished_run
        code, out, err = run_main("eval", run, "--data", client_folders / "test.jsonl", "--json")
        result, final = json.loads(out), read_summary(run)["final"]
        assert (code, err) == (0, "")
        assert result["accuracy"] == final["accuracy"]
        assert result["loss"] == pytest.approx(final["loss"], abs=1e-6)
        assert result["examples"] == 48

    def test_eval_reads_other_columns(
        self, finished_run: Finished, client_folders: Path, run_main: RunMain, tmp_path: Path
    ) -> None:
        rows = read_rows(client_folders / "test.jsonl")
        other = write_rows(
            tmp_path / "o.jsonl", [{"note": r["text"], "chapter": r["label"]} for r in rows]
        )
        columns = ("--text-column", "note", "--label-column", "chapter")
        code, out, _ = run_main("eval", finished_run[0], "--data", other, *columns)
        accuracy = read_summary(finished_run[0])["final"]["accuracy"]
        assert code == 0
        assert f"accuracy {accuracy:.1%}" in out

    def test_the_merged_export_needs_no_peft(
        self,
        finished_run: Finished,
        peft_logits: NDArray[np.float32],
        client_folders: Path,
        run_main: RunMain,
        tmp_path: Path,
    ) -> None:
        from safetensors.torch import load_file
        from transformers import AutoModel

        out = tmp_path / "models" / "merged"
        code, _, err = run_main("export", finished_run[0], "--format", "merged", "--out", out)
        assert (code, err) == (0, "")
        encoder, head = AutoModel.from_pretrained(out), load_file(out / "classifier.safetensors")

        class Plain(torch.nn.Module):
            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                states = encoder.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
                return states.mean(1) @ head["weight"].T + head["bias"]  # one text: no padding

        texts = [row["text"] for row in read_rows(client_folders / "test.jsonl")]
        np.testing.assert_allclose(classify(Plain(), out, texts), peft_logits, atol=1e-5)
        labels = read_summary(finished_run[0])["labels"]
        assert [encoder.config.id2label[i] for i in range(4)] == labels
        assert [path.name for path in out.parent.iterdir()] == ["merged"]

    def test_the_adapter_export_is_the_adapter(
        self, finished_run: Finished, run_main: RunMain, tmp_path: Path
    ) -> None:
        out = tmp_path / "adapter"
        code, *_ = run_main("export", finished_run[0], "--format", "adapter", "--out", out)
        assert code == 0
        old, new = tree(finished_run[0] / "adapter"), tree(out)
        assert set(new) == set(old)
        config = "adapter_config.json"  # peft keeps the targets as a set, in no certain order
        assert {new.pop(config), old.pop(config)}
        assert new == old
        first, second = (
            json.loads((folder / config).read_text())
            for folder in (out, finished_run[0] / "adapter")
        )
        assert set(first.pop("target_modules")) == set(second.pop("target_modules"))
        assert first == second


def test_report_writes_the_page_again(
    finished_run: Finished, run_main: RunMain, tmp_path: Path
) -> None:
    import shutil

    run = shutil.copytree(finished_run[0], tmp_path / "copy")
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()

    code, out, err = run_main("report", run)

    assert (code, err) == (0, "")
    assert "clinic-2" in out
    assert (run / "report.html").read_bytes() == page
    code, out, _ = run_main("report", run, "--json")
    assert json.loads(out) == {"run": str(run), **read_summary(run)}


def test_nothing_but_the_configuration_decides_the_adapter(
    finished_run: Finished, launcher: Launcher, quick: list[str]
) -> None:
    """Not the number of workers, not the network format, not the process, not the folder."""
    wanted = adapter_bytes(finished_run[0])
    accuracy = read_summary(finished_run[0])["final"]
    for name, flags in {
        "inline": ["--workers", "0"],
        "one": ["--workers", "1"],
        "wired": ["--wire"],
    }.items():
        code, command = launcher.run(*quick, "--out", name, *flags)
        assert code == 0, command.stderr
        assert adapter_bytes(launcher.folder / name) == wanted, name
        assert read_summary(launcher.folder / name)["final"] == accuracy, name
    code, _ = launcher.run(*quick, "--out", "seeded", "--seed", "1")
    assert code == 0
    assert adapter_bytes(launcher.folder / "seeded") != wanted


def test_a_second_run_finds_a_name_of_its_own(launcher: Launcher, quick: list[str]) -> None:
    for _ in range(2):
        code, command = launcher.run(*quick, "--rounds", "1", "--workers", "0")
        assert code == 0, command.stderr
    names = sorted(path.name for path in (launcher.folder / "runs").iterdir())
    assert names == ["clinics", "clinics-2"]
    assert adapter_bytes(launcher.folder / "runs" / "clinics") == adapter_bytes(
        launcher.folder / "runs" / "clinics-2"
    )


def test_float16_halves_what_a_client_sends(launcher: Launcher, quick: list[str]) -> None:
    floats = (*PLAIN, "--set", "update.bits=unset", "--set", "update.clip=unset")
    code, command = launcher.run(*quick, "--out", "full", *floats)
    assert code == 0, command.stderr
    code, command = launcher.run(*quick, "--out", "half", *floats, "--set=update.compress=float16")
    assert code == 0, command.stderr
    full, half = read_summary(launcher.folder / "full"), read_summary(launcher.folder / "half")
    parameters = full["adapter_parameters"]
    assert half["bytes_up"] == full["bytes_up"] - 3 * 4 * 2 * parameters
    assert half["bytes_down"] == full["bytes_down"]
    for name, tensor in adapter_tensors(launcher.folder / "half").items():
        np.testing.assert_allclose(
            tensor, adapter_tensors(launcher.folder / "full")[name], atol=0.02
        )


def test_references_add_what_to_compare_with_and_change_nothing(
    finished_run: Finished, launcher: Launcher, quick: list[str]
) -> None:
    code, command = launcher.run(*quick, "--out", "compared", "--references", "--json")
    assert code == 0, command.stderr
    summary = json.loads(command.stdout)
    references = {reference["name"]: reference for reference in summary["references"]}
    assert list(references) == ["centralized", "local-only", "linear-head"]
    alone = [client["local_accuracy"] for client in summary["per_client"]]
    assert references["local-only"]["accuracy"] == pytest.approx(float(np.mean(alone)))
    # The same budget of sample-steps: 4 clients, 3 rounds, 6 steps, up to the last whole batch.
    batch = int(
        re.search(
            r"batch-size = (\d+)", (launcher.folder / "compared" / "config.toml").read_text()
        )[1]
    )  # type: ignore[index]
    budget = 4 * 3 * 6 * batch
    for reference in references.values():
        assert 0 <= reference["accuracy"] <= 1
        assert budget // 2 < reference["sample_steps"] <= budget
    assert adapter_bytes(launcher.folder / "compared") == adapter_bytes(finished_run[0])
    # They start from the beginning, also in the process that has trained the rounds.
    code, command = launcher.run(
        *quick, "--workers", "0", "--out", "alone", "--references", "--json"
    )
    assert code == 0, command.stderr
    for reference in json.loads(command.stdout)["references"]:
        expected = references[reference["name"]]["accuracy"]
        assert reference["accuracy"] == pytest.approx(expected, abs=0.02)


@pytest.fixture(scope="module")
def small(tiny_base: Path) -> list[str]:
    """Arguments of the smallest run, without data."""
    words = "--rounds 2 --workers 0 --set train.steps=3 --set train.batch-size=4"
    return ["simulate", "--base", str(tiny_base), *words.split()]


class TestData:
    """Data as people have it."""

    def test_clients_with_test_sets_of_their_own(
        self, launcher: Launcher, small: list[str], client_folders: Path, tiny_base: Path
    ) -> None:
        folder, sizes = launcher.folder / "wards", (7, 12, 1)
        test = read_rows(client_folders / "test.jsonl")
        for place, size in enumerate(sizes):
            rows = read_rows(client_folders / f"clinic-{place}" / "train.jsonl")
            write_rows(folder / f"ward-{place}" / "train.jsonl", rows)
            write_rows(folder / f"ward-{place}" / "test.jsonl", test[place * 12 :][:size])
        rows = read_rows(client_folders / "clinic-3" / "train.jsonl")
        write_rows(folder / "ward-3" / "train.jsonl", rows)  # and one without any

        code, command = launcher.run(*small, "--data", folder, "--out", "run")

        assert code == 0, command.stderr
        run = launcher.folder / "run"
        summary = read_summary(run)
        own = [client["accuracy"] for client in summary["per_client"]]
        assert own[3] is None
        assert own[:3] == [client["own_mix_accuracy"] for client in summary["per_client"][:3]]
        assert summary["final"]["accuracy"] == pytest.approx(np.average(own[:3], weights=sizes))
        from peft import PeftModel

        from fedtune.base.classifier import load_classifier

        model = PeftModel.from_pretrained(load_classifier(str(tiny_base), 4), run / "adapter")
        for place, size in enumerate(sizes):
            mine = test[place * 12 :][:size]
            logits = classify(model, tiny_base, [row["text"] for row in mine])
            names = [summary["labels"][i] for i in logits.argmax(1)]
            hits = [name == row["label"] for name, row in zip(names, mine, strict=True)]
            assert own[place] == pytest.approx(np.mean(hits))

    def test_references_where_one_client_has_no_test_set(
        self, launcher: Launcher, small: list[str], client_folders: Path
    ) -> None:
        folder = launcher.folder / "wards"
        test = read_rows(client_folders / "test.jsonl")
        for place in range(2):
            rows = read_rows(client_folders / f"clinic-{place}" / "train.jsonl")
            write_rows(folder / f"ward-{place}" / "train.jsonl", rows)
        write_rows(folder / "ward-0" / "test.jsonl", test)

        code, command = launcher.run(
            *small, "--data", folder, "--out", "run", "--references", *PLAIN
        )

        assert code == 0, command.stderr
        alone = [c["local_accuracy"] for c in read_summary(launcher.folder / "run")["per_client"]]
        assert alone[0] is not None
        assert alone[1] is None

    def test_one_file_divided_by_a_column(
        self, launcher: Launcher, small: list[str], client_folders: Path
    ) -> None:
        rows = [
            {**row, "hospital": name, "id": i}
            for place, name in enumerate(["Süd", "North", "10"])
            for i, row in enumerate(read_rows(client_folders / f"clinic-{place}" / "train.jsonl"))
        ]
        write_rows(launcher.folder / "notes.jsonl", rows)
        data = ("--data", "notes.jsonl", "--partition", "column:hospital")

        code, command = launcher.run(*small, *data, "--json")

        assert code == 0, command.stderr
        summary = read_summary(launcher.folder / "runs" / "notes")
        sizes = {client["name"]: client["examples"] for client in summary["per_client"]}
        assert set(sizes) == {"Süd", "North", "10"}
        held_out = int(re.match(r"\d+", summary["evaluation"])[0])  # type: ignore[index]
        assert sum(sizes.values()) + held_out == len(rows)
        assert held_out == pytest.approx(0.2 * len(rows), abs=10)

    def test_odd_clients_are_told_of_and_the_rest_goes_on(
        self, launcher: Launcher, small: list[str], client_folders: Path
    ) -> None:
        """No rows, no file, one class, labels of its own, and texts of every kind."""
        folder = launcher.folder / "odd"
        rows = read_rows(client_folders / "clinic-0" / "train.jsonl")
        write_rows(folder / "0 full" / "train.jsonl", rows)
        write_rows(folder / "1 empty" / "train.jsonl", [])
        (folder / "2 bare").mkdir()
        one = [row for row in rows if row["label"] == rows[0]["label"]]
        write_rows(folder / "3 single" / "train.jsonl", one)
        strange = [
            "größe 🩺 骨折",
            "العربية",
            "\u2028",
            "e\u0301" * 9,
            "word " * 20_000,
            "x\x00y",
            ".",
        ]
        own = [{"text": text, "label": f"наш {i % 2}"} for i, text in enumerate(strange)]
        write_rows(folder / "4 ünïcode" / "train.jsonl", [*own[:2], *own[3:]])
        write_rows(folder / "test.jsonl", read_rows(client_folders / "test.jsonl"))

        code, command = launcher.run(*small, "--data", folder, "--out", "run")

        assert code == 0, command.stderr
        summary = read_summary(launcher.folder / "run")
        names = [client["name"] for client in summary["per_client"]]
        assert names == ["0 full", "3 single", "4 ünïcode"]
        assert len(summary["labels"]) == 6
        assert [sum(n > 0 for n in c["label_counts"]) for c in summary["per_client"]] == [4, 1, 2]
        said = " ".join(summary["warnings"])
        for part in (
            "1 empty has no rows",
            "2 bare has no train file",
            "3 single",
            "one label only",
        ):
            assert part in said
        assert "20,000" in said or "longer than" in said
        assert "note: " in command.stderr
        assert "1 empty" in command.stderr
        assert all(row["failed"] == {} for row in read_metrics(launcher.folder / "run"))
        assert "4 ünïcode" in (launcher.folder / "run" / "report.html").read_text()

    def test_a_common_vocabulary_of_labels_in_the_given_order(
        self, launcher: Launcher, small: list[str], client_folders: Path, finished_run: Finished
    ) -> None:
        labels = ["none of them", *reversed(read_summary(finished_run[0])["labels"])]
        given = ("--set", f"data.labels={json.dumps(labels)}")

        code, command = launcher.run(*small, "--data", client_folders, "--out", "run", *given)

        assert code == 0, command.stderr
        assert read_summary(launcher.folder / "run")["labels"] == labels
        assert next(
            t.shape for n, t in adapter_tensors(launcher.folder / "run").items() if "bias" in n
        ) == (5,)

    def test_a_cohort_is_drawn_for_each_round(
        self, launcher: Launcher, small: list[str], client_folders: Path
    ) -> None:
        drawn = (*PLAIN, "--set", "rounds.clients-per-round=2", "--rounds", "6")
        code, command = launcher.run(*small, "--data", client_folders, "--out", "run", *drawn)
        assert code == 0, command.stderr
        cohorts = [tuple(row["clients"]) for row in read_metrics(launcher.folder / "run")]
        assert {len(cohort) for cohort in cohorts} == {2}
        assert len(set(cohorts)) > 1
        taken = [
            client["rounds_completed"]
            for client in read_summary(launcher.folder / "run")["per_client"]
        ]
        assert sum(taken) == 12
