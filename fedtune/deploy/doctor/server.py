"""The checks of a server."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Config, Listen, load_config, load_server
from fedtune.deploy.doctor.data import examine_base, look_at_rows
from fedtune.deploy.doctor.findings import FIRST, Examination, Verdict
from fedtune.deploy.doctor.keys import examine_server_keys
from fedtune.deploy.doctor.machine import Needs, examine_machine
from fedtune.deploy.doctor.packages import examine_packages
from fedtune.deploy.doctor.pytorch import absent
from fedtune.deploy.doctor.site import CORRECT, extras_for
from fedtune.deploy.doctor.vision import look_at_emulator, look_at_questions
from fedtune.deploy.keys import Members
from fedtune.errors import ConfigError
from fedtune.report import words

SETTINGS = "server.toml"
_PORT = "see server.host, server.port and server.base-port"


@dataclass(frozen=True)
class _Files:
    """federation.toml, and server.toml beside it."""

    folder: Path
    federation: Config
    listen: Listen

    def find(self, name: str) -> Path:
        return self.folder / Path(name).expanduser()


def examine_server(examination: Examination, path: Path) -> None:
    """Check the machine of the server whose federation.toml `path` is."""
    examination.begin("configuration")
    files = examination.run("files", lambda: _read(path))
    if files is None:
        examine_packages(examination, {"torch", "report"})
        examine_machine(examination, path.parent)
        return
    config, listen = files.federation, files.listen
    vision = config.base.task == "visual-question-answering"
    test = files.find(listen.test) if listen.test else None
    examine_packages(examination, extras_for(config, [test] if test else []) | {"report"})
    members = examine_server_keys(examination, files.folder, listen)
    examination.begin("network")
    examination.run("port", lambda: _port(listen.host, listen.port), _PORT)
    if config.base.placement == "server":
        examination.run("base port", lambda: _port(listen.host, listen.base_port), _PORT)
    base = examine_base(examination, config, ())
    if config.base.placement == "emulator":
        _examine_emulator(examination, files)
    if test is not None:
        examination.begin("data")
        if vision:
            examination.run("rows to test on", lambda: look_at_questions(test, config))
        else:
            examination.run("rows to test on", lambda: look_at_rows(test, config))
    needs = Needs()
    if vision:
        examination.begin("a round")
        examination.skip("traffic", "not predicted for a model of images", "see docs/nano.md")
    else:
        needs = _predict(examination, files, base[0] if base else None, members)
    examine_machine(examination, files.find(listen.run), needs, None, config.train.device)


def _examine_emulator(examination: Examination, files: _Files) -> None:
    path = files.federation.emulator.path
    if path is None:
        advice = "make one with: fedtune nano emulator"
        verdict: Verdict[None] = Verdict("problem", "emulator.path is missing", advice)
        examination.add("emulator", verdict)
    elif lacking := absent():
        examination.skip("emulator", f"not installed: {', '.join(lacking)}", FIRST)
    else:
        found = files.find(path)
        examination.run("emulator", lambda: look_at_emulator(found, files.federation))


def _read(path: Path) -> Verdict[_Files]:
    folder = path.parent
    try:
        listen = load_server(folder / SETTINGS).server
        federation = load_config(path, values={"base.path": listen.base or None})
        if federation.lacks_labels:
            raise ConfigError(f"{path}: data.labels is missing; name the labels in their order")
    except ConfigError as error:
        return Verdict("problem", str(error), CORRECT)
    text = f"{path} and {SETTINGS} say what they must"
    return Verdict("ok", text, value=_Files(folder, federation, listen))


def _port(host: str, port: int) -> Verdict[None]:
    where = f"{host} port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            todo = "nothing, if fedtune server is running; else set another port"
            return Verdict("warning", f"{where} is in use", todo)
        words_ = f"cannot listen at {where}: {error.strerror}"
        return Verdict("problem", words_, _PORT)
    return Verdict("ok", f"{where} is free")


def _predict(
    examination: Examination, files: _Files, base: Path | None, members: Members | None
) -> Needs:
    """What rounds need of this machine, as far as it can be told."""
    lacking = absent()
    if base is None or members is None or lacking:
        why = f"not installed: {', '.join(lacking)}" if lacking else "no base model or no roster"
        examination.begin("a round")
        examination.skip("traffic", why, FIRST)
        return Needs()
    from fedtune.deploy.doctor import predict
    from fedtune.deploy.doctor.traffic import predict_traffic
    from fedtune.simulation.job import check_cohort, check_privacy

    config, names = files.federation, list(members.transport)
    clients = len(names)
    examination.begin("base model")
    shape = examination.run("model", lambda: predict.look_at(base, config))
    if shape is None:
        return Needs()
    examination.begin("a round")

    def terms() -> Verdict[bool]:
        check_cohort(config, clients)
        check_privacy(config, shape.shared, clients)
        text = f"what the configuration asks for is possible with {clients} sites"
        return Verdict("ok", text, value=True)

    def traffic() -> Verdict[None]:
        found = predict_traffic(config, shape.shared, names[0], names)
        asked = min(config.rounds.clients_per_round or clients, clients)
        text = (
            f"about {words.size(found.up * asked)} in and {words.size(found.down * asked)} out "
            f"with {words.plural(asked, 'site')} in each of "
            f"{words.plural(config.rounds.count, 'round')}, and what HTTP and TLS add"
        )
        numbers = {
            "bytes_up_per_round": found.up * asked,
            "bytes_down_per_round": found.down * asked,
        }
        return Verdict("ok", text, numbers=numbers)

    if not examination.run("terms", terms):
        examination.skip("traffic", "there can be no round", FIRST)
    else:
        examination.run("traffic", traffic)
    evaluates = files.listen.test is not None
    memory = predict.server_memory(shape, clients, predict.process_memory(), evaluates)
    return Needs(predict.server_disk(shape, clients), memory)
