"""app.py in a browser: pick, ask, see, in every mode; broken clips, several people, what is out of reach."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from browser import PATIENCE, Browser, needs_chromium
from conftest import write_clip

import app
from dataset import MODE_TABLE, MODES
from demo.assemble_detector import BASE, assemble
from model import Answer, DriveVLM
from training.common import ConfigError, load_config
from training.config import AppConfig

TEXT = "A red car ahead brakes. No bus is there."


def flags(world, *more):
    return ["--checkpoint", *map(str, world.checkpoints), "--video_root", str(world.clips), "--dtype", "float32",
            "--detector.weights", str(world.detector), "--detector.image_size", "96", "--detector.num_frames", "3",
            "--evidence_cache", str(world.root / "evidence"), "--max_upload_mb", "1",
            "--vision_model", "none", "--language_model", "none", *map(str, more)]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Two checkpoints, two clips, the toy detector."""
    root = tmp_path_factory.mktemp("app")
    checkpoints = []
    for seed, stage in ((1, 2), (2, 3)):
        model = DriveVLM.from_base(tiny.vision, tiny.llm, num_frames=2, dtype="float32", seed=seed)
        model.add_lora(2, 4, 0.0, seed)
        checkpoints.append(model.save_checkpoint(root / f"stage{stage}", stage=stage))
    (root / "clips" / "more").mkdir(parents=True)
    for name in ("car.mp4", "more/bus.mp4"):
        write_clip(root / "clips" / name, seed=len(name))
    return SimpleNamespace(root=root, checkpoints=checkpoints, clips=root / "clips",
                           detector=assemble(BASE, root / "detector.pt"))


@pytest.fixture(scope="module")
def site(world):
    """The page's address and what it is made of; served in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = load_config(AppConfig, flags(world, "--port", port))
    clips, folders = app.check(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(world.root / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        desk = app.Desk(config, clips, {name: app.open_model(config, folder) for name, folder in folders.items()})
        page = app.build_page(desk)
        app.launch(page, config, wait=False)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", port=port, desk=desk, page=page)
        page.close()


@pytest.fixture(scope="module")
def browsers(tmp_path_factory):
    """A function that gives one more browser."""
    opened = []

    def start():
        opened.append(Browser(tmp_path_factory.mktemp("profile")))
        opened[-1].size(1280, 900)
        return opened[-1]

    yield start
    for browser in opened:
        browser.close()


@pytest.fixture(scope="module")
def browser(browsers):
    return browsers()


@pytest.fixture
def page(browser, site):
    """The page, freshly opened, with the first clip's frames."""
    return visit(browser, site)


def visit(browser, site):
    browser.open(site.url)
    browser.wait("document.querySelectorAll('#film .frame img').length == 2")
    return browser


def click(page, selector):
    page.js(f"document.querySelector({selector!r}).click()")


def choose(page, label):
    """Click the radio button of this label."""
    page.js(f"[...document.querySelectorAll('#how label')].find(x => x.textContent.trim() == {label!r})"
            ".querySelector('input').click()")


def text_of(page, selector):
    return page.js(f"[...document.querySelectorAll({selector!r})].map(x => x.textContent.trim()).join(' | ')")


def answers(page):
    """The finished answers, after waiting for both."""
    page.wait("document.querySelectorAll('.answer.app.done').length == 2")
    return [text_of(page, f"#answer{k} .answer p") for k in range(2)]


def pick(page, name):
    page.js("document.querySelector('#clip input').dispatchEvent(new FocusEvent('focus'))")
    page.wait("document.querySelectorAll('[role=option]').length == 2")
    page.js(f"[...document.querySelectorAll('[role=option]')].find(x => x.textContent.includes({name!r}))"
            ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))")
    page.wait(f"document.querySelector('#film h3').textContent == {name.split('/')[-1]!r}")


def send(page, file):
    root = page("DOM.getDocument")["root"]["nodeId"]
    node = page("DOM.querySelector", nodeId=root, selector="#upload input[type=file]")["nodeId"]
    page("DOM.setFileInputFiles", files=[str(file)], nodeId=node)


def say_slowly(go_on):
    """A stand-in for `app.say` that writes TEXT word by word, the second half when `go_on` is set."""

    def say(model, clip, question, limit, streamer):
        words = TEXT.split()
        for i, word in enumerate(words):
            if i == 4:
                assert go_on.wait(PATIENCE)
            streamer.on_finalized_text(word + " ")
        streamer.on_finalized_text("", stream_end=True)
        return Answer(TEXT, [1] * len(words), True)

    return say


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@needs_chromium
@pytest.mark.parametrize("mode", MODE_TABLE)
def test_pick_ask_and_see_what_both_checkpoints_say(site, page, mode, monkeypatch):
    pick(page, "more/bus.mp4")
    choose(page, mode.capitalize())
    asked, say = [], app.say
    monkeypatch.setattr(app, "say", lambda *given: asked.append(say(*given[:3], 6, given[4])) or asked[-1])
    click(page, "#ask")
    shown = answers(page)
    frames = app.decode_frames(site.desk.clips["more/bus.mp4"], 2, 96)[None]
    for text, answer, model in zip(shown, asked, site.desk.models.values(), strict=True):
        [expected] = model.generate(app.torch.from_numpy(frames), [MODES[mode]], max_new_tokens=6)
        assert answer == expected and " ".join(text.split()) == " ".join(expected.text.split())
    assert "6 tokens in" in text_of(page, "#answer0 .answer") and "Stage 2" in text_of(page, "#answer0 .tag")
    assert "Stage 3" in text_of(page, "#answer1 .tag")


@needs_chromium
def test_an_answer_is_shown_as_it_is_written_then_with_its_receipts(page, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(app, "say", say_slowly(go_on))
    click(page, "#ask")
    page.wait("document.querySelector('#answer0 .writing p')?.textContent.includes('A red car ahead')")
    assert "brakes" not in text_of(page, "#answer0 p") and not page.js("!!document.querySelector('#answer0 mark')")
    go_on.set()
    assert answers(page) == [TEXT, TEXT]
    marks = page.js("[...document.querySelectorAll('#answer0 mark')].map(x => [x.className, x.textContent])")
    assert ["unsupported", "car"] in marks and ["negated", "bus"] in marks  # an empty road: the detector sees nothing
    assert "car: not seen" in text_of(page, "#answer0 .receipts li")


@needs_chromium
def test_own_words_are_asked_for_and_must_be_there(page, monkeypatch):
    monkeypatch.setattr(app, "say", lambda model, clip, question, limit, streamer: streamer.end() or Answer(
        f"[{question}]", [1], True))
    choose(page, app.OWN_WORDS)
    page.wait("!!document.querySelector('#question textarea')")
    click(page, "#ask")
    page.wait("document.querySelector('#film .problem')?.textContent.includes('Write a question')")
    page.js("document.querySelector('#question textarea').focus()")
    page("Input.insertText", text="Is <b>anybody</b> crossing?")
    click(page, "#ask")
    assert answers(page) == ["[Is <b>anybody</b> crossing?]"] * 2


@needs_chromium
def test_a_clip_of_ones_own_is_asked_about(world, site, page, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "say", lambda model, clip, question, limit, streamer: streamer.end() or Answer(
        clip.name, [1], True))
    write_clip(tmp_path / "mine.mp4", seed=5)
    send(page, tmp_path / "mine.mp4")
    page.wait("document.querySelector('#film h3').textContent == 'mine.mp4'")
    click(page, "#ask")
    assert answers(page) == ["mine.mp4"] * 2
    sent = list((world.root / "uploads").rglob("mine.mp4"))
    assert sent and (sent[0].parent / "evidence").is_dir()  # not among the evidence of the clips in video_root


@needs_chromium
def test_broken_large_and_foreign_files_are_refused_and_the_page_goes_on(page, tmp_path, monkeypatch):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    send(page, tmp_path / "broken.mp4")
    page.wait("document.querySelector('#film .problem')?.textContent.includes('broken.mp4')")
    click(page, "#ask")
    time.sleep(0.5)
    assert "not a readable video" in text_of(page, "#film .problem")
    for name, content, reason in (("large.mp4", bytes(2_000_000), "maximum allowed size"),
                                  ("notes.txt", b"not a clip", "Invalid file type")):
        page.open(page.js("location.href"))
        page.wait("document.querySelectorAll('#film .frame img').length == 2")
        (tmp_path / name).write_bytes(content)
        send(page, tmp_path / name)
        page.wait(f"document.querySelector('.toast-wrap')?.textContent.includes({reason!r})")
    page.open(page.js("location.href"))
    page.wait("document.querySelectorAll('#film .frame img').length == 2")
    monkeypatch.setattr(app, "say", say_slowly(SimpleNamespace(wait=lambda _: True)))
    click(page, "#ask")
    assert answers(page) == [TEXT, TEXT]


@needs_chromium
def test_two_people_at_once_get_their_own_answers(site, browsers, page, monkeypatch):
    busy, most = [], []

    def say(model, clip, question, limit, streamer):
        busy.append(clip)
        most.append(len(busy))
        time.sleep(0.3)
        busy.pop()
        streamer.end()
        return Answer(clip.name, [1], True)

    monkeypatch.setattr(app, "say", say)
    other = visit(browsers(), site)
    pick(other, "more/bus.mp4")
    click(page, "#ask")
    click(other, "#ask")
    assert answers(page) == ["car.mp4"] * 2 and answers(other) == ["bus.mp4"] * 2
    assert max(most) == 1


@needs_chromium
def test_an_error_in_the_model_is_shown_and_the_page_goes_on(page, monkeypatch):
    def say(model, clip, question, limit, streamer):
        raise app.ModelError("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(app, "say", say)
        click(page, "#ask")
        page.wait("document.querySelector('#film .problem')?.textContent.includes('out of something')")
    monkeypatch.setattr(app, "say", say_slowly(SimpleNamespace(wait=lambda _: True)))
    click(page, "#ask")
    assert answers(page) == [TEXT, TEXT]


@needs_chromium
def test_the_page_asks_nobody_else_and_fits_a_phone(site, page):
    asked = [event["params"]["request"]["url"] for event in page.events
             if event.get("method") == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((site.url, f"http://127.0.0.1:{site.port}", "data:", "blob:")) for url in asked)
    page.size(390, 844)
    assert page.js("document.documentElement.scrollWidth") <= 390
    page.size(1280, 900)


# ---------------------------------------------------------------------------------------------------------------------
# Without one


def status(url, data=None):
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_large_file_is_refused_by_the_server_too(site):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    request = urllib.request.Request(f"{site.url}gradio_api/upload", head + bytes(2_000_000) + b"\r\n--x--\r\n",
                                     {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=PATIENCE)


def test_files_are_out_of_reach(world, site):
    for path in ("/etc/passwd", world.checkpoints[0] / "drivevlm.json", world.clips / "car.mp4", "README.md"):
        code, content = status(f"{site.url}gradio_api/file={path}")
        assert code == 403 and b"not allowed" in content
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):  # served at 127.0.0.1 alone
        other.connect(("127.0.0.2", site.port))


@pytest.mark.parametrize("name, upload, how", [
    ("../stage2/drivevlm.json", None, "Microscope"), ("/etc/passwd", None, "Microscope"),
    ("car.mp4", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "Microscope"),
    ("car.mp4", None, "Telescope"), ([], None, "Microscope")])
def test_what_the_page_does_not_offer_is_refused(site, name, upload, how):
    number = next(n for n, event in site.page.fns.items() if event.name == "respond")
    asked = {"data": [name, upload, how, ""], "fn_index": number, "session_hash": f"test{time.monotonic_ns()}"}
    code, _ = status(f"{site.url}gradio_api/queue/join", json.dumps(asked).encode())
    assert code == 200
    with urllib.request.urlopen(f"{site.url}gradio_api/queue/data?session_hash={asked['session_hash']}",
                                timeout=PATIENCE) as stream:
        done = None
        for line in stream:
            if line.startswith(b"data:") and json.loads(line[5:])["msg"] == "process_completed":
                done = json.loads(line[5:])
                break
    assert done["success"] is False and "root:" not in json.dumps(done)


def test_all_that_is_wrong_is_said_at_once(world, capsys, tmp_path):
    with pytest.raises(ConfigError) as caught:
        app.check(load_config(AppConfig, ["--checkpoint", str(tmp_path), "--video_root", str(tmp_path),
                                          "--detector.weights", str(tmp_path / "no.pt")]))
    with pytest.raises(ConfigError, match="vision_model: google/siglip2.* was trained with .*/vision"):
        app.check(load_config(AppConfig, flags(world, "--vision_model", "google/siglip2-so400m-patch14-384")))
    text = str(caught.value)
    assert "--checkpoint: " in text and "--video_root: no clip in" in text and "no.pt" in text
    with pytest.raises(ConfigError, match="--checkpoint: must be given"):
        load_config(AppConfig, [])
    capsys.readouterr()


def test_a_folder_of_images_can_be_picked(world, tmp_path):
    (tmp_path / "drive_1").mkdir()
    (tmp_path / "drive_1" / "1.png").write_bytes(b"")
    config = load_config(AppConfig, [*flags(world), "--video_root", str(tmp_path)])
    assert app.check(config)[0] == {"drive_1": tmp_path / "drive_1"}
    config.video_root = str(tmp_path / "drive_1")
    assert list(app.check(config)[0]) == ["drive_1"]


def test_the_program_serves_the_page_and_leaves_nothing_behind(world, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    program = subprocess.Popen([sys.executable, "app.py", *flags(world, "--port", port)], cwd=app.__file__[:-6],
                               env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert f"open http://127.0.0.1:{port}" in program.stdout.readline()
        until = time.monotonic() + PATIENCE
        while True:
            try:
                assert status(f"http://127.0.0.1:{port}/")[0] == 200
                break
            except urllib.error.URLError:
                assert time.monotonic() < until
                time.sleep(0.2)
        assert list(tmp_path.glob("drivevlm-app-*"))
        program.terminate()
        assert program.wait(PATIENCE) in (0, 130)
        assert not list(tmp_path.glob("drivevlm-app-*"))
    finally:
        program.kill()


def test_a_port_that_is_taken_is_named(world, site, capsys):
    config = load_config(AppConfig, flags(world, "--port", site.port))
    with pytest.raises(ConfigError, match=f"--port: {site.port} is taken"):
        app.launch(app.build_page(site.desk), config, wait=False)
    capsys.readouterr()


def test_only_clips_of_the_list_are_read(world, site):
    assert site.desk.clip_of("car.mp4", None) == world.clips / "car.mp4"
    for name in ("../stage2/drivevlm.json", str(world.clips / "car.mp4"), None):
        with pytest.raises(app.DriveVLMError, match="Pick a clip"):
            site.desk.clip_of(name, None)


def test_a_question_is_a_modes_or_ones_own(site):
    for mode, info in MODE_TABLE.items():
        assert site.desk.question_of(mode.capitalize(), "ignored") == (info.question, info.max_new_tokens)
    assert site.desk.question_of(app.OWN_WORDS, "  Why? ")[0] == "Why?"
    for bad in (None, "", "  ", "x" * (app.MAX_QUESTION_LENGTH + 1)):
        with pytest.raises(app.DriveVLMError, match="Write a question"):
            site.desk.question_of(app.OWN_WORDS, bad)
