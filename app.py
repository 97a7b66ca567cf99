"""A page on which checkpoints are asked about a clip, side by side, with what a detector sees beside what they say.

    python app.py --checkpoint output/stage2 output/stage3 --video_root data/videos
    python app.py --config configs/demo/stage3.yaml --checkpoint output/demo/stage2 output/demo/stage3    # toy world

Then open http://127.0.0.1:7860: pick a clip of --video_root or give one of your own, and ask for a mode's answer or in
your own words. Answers are shown as they are written, one checkpoint after the other; then each object that they name
is coloured by what the detector sees, with a line that says when and where. Several people can ask: they take turns.
The page is for this machine alone (127.0.0.1), needs no network, and gives no access to other files than the clips in
--video_root. Detector settings are those of --config; --detect false does without.
"""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

from training.common import DriveVLMError, base_model_differences, fail, load_config, run_main
from training.config import AppConfig

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported, which takes seconds
    load_config(AppConfig, default_config="configs/stage3.yaml", description=__doc__)

import torch
from transformers import TextIteratorStreamer

from dataset import (
    IMAGE_SUFFIXES,
    MODE_TABLE,
    VIDEO_SUFFIXES,
    DataError,
    decode_frames,
    decode_sample,
    decode_times,
    find_clips,
    root_of_clips,
    video_reader_problems,
)
from model import DriveVLM, ModelError, read_checkpoint, resolve_dtype
from pages.render import film_strip, highlight, page_file, render
from stage3.detect_objects import make_detector, weights_problems
from stage3.evidence import clip_evidence, evidence_dict
from stage3.receipts import lines, look, receipts
from stage3.report import boxes_at, evenly

OWN_WORDS = "Own words"
SHOWN_FRAMES = 8
MAX_QUESTION_LENGTH = 400


def main(argv: list[str] | None = None) -> None:
    config = load_config(AppConfig, argv, default_config="configs/stage3.yaml", description=__doc__)
    clips, folders = check(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, with nothing left behind
    with tempfile.TemporaryDirectory(prefix="drivevlm-app-") as uploads:
        # gradio reads these when it is imported: the folder for uploads, telemetry off
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        models = {name: open_model(config, folder) for name, folder in folders.items()}
        page = build_page(Desk(config, clips, models))
        print(f"open http://127.0.0.1:{config.port} | {len(clips)} clips, {', '.join(models)} | Ctrl-C ends it",
              flush=True)
        launch(page, config)


def check(config) -> tuple[dict[str, Path], dict[str, Path]]:
    """({clip's name: file}, {checkpoint's name: folder}); ConfigError where anything is wrong."""
    problems, folders, clips = video_reader_problems(config), {}, {}
    for text in config.checkpoint:
        try:
            folder, meta = read_checkpoint(text)
        except ModelError as error:
            problems.append(f"--checkpoint: {error}")
            continue
        folders[f"Stage {meta['stage']} ({text})"] = folder
        problems += base_model_differences(config, meta, text)
    try:
        for path in find_clips(config.video_root) if Path(config.video_root).is_dir() else ():
            clips[os.path.relpath(path, root_of_clips(config.video_root))] = path
        if not clips:
            suffixes = ", ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
            problems.append(f"--video_root: no clip in {config.video_root} ({suffixes})")
    except DataError as error:
        problems.append(f"--video_root: {error}")
    if config.detect:
        problems += weights_problems(config.detector, "detector")
    if problems:
        fail(problems)
    return clips, folders


def open_model(config, folder):
    return DriveVLM.from_checkpoint(folder, dtype=resolve_dtype(config.dtype),
                                    device="cuda" if torch.cuda.is_available() else "cpu",
                                    vision_model=config.vision_model, language_model=config.language_model)


class Desk:
    """What the page does. Every method returns HTML, or yields it as it grows."""

    def __init__(self, config, clips: dict[str, Path], models: dict[str, DriveVLM]):
        self.config, self.clips, self.models = config, clips, models
        self.detector = make_detector(config.detector) if config.detect else None
        self.lock = threading.Lock()  # one answer at a time; held by the thread that writes it

    def clip_of(self, name, upload) -> Path:
        """The clip that is asked about: one that was sent, else one of the list. DriveVLMError for any other."""
        if upload:
            return Path(upload)
        if name not in self.clips:
            raise DriveVLMError("Pick a clip, or send one.")
        return self.clips[name]

    def show_clip(self, name, upload) -> str:
        """The clip's frames."""
        try:
            return self.frames(self.clip_of(name, upload), None)
        except DriveVLMError as error:
            return problem(error)

    def frames(self, clip: Path, record) -> str:
        """The clip's frames, with boxes where there is a detector's record of it."""
        seconds, times, frames = decode_sample(clip, next(iter(self.models.values())).num_frames)
        shown, boxes, seen = evenly(range(len(frames)), SHOWN_FRAMES), None, None
        evidence = clip_evidence(record, self.config.detector) if record else None
        if evidence:
            seen = evidence_dict(evidence)
            boxes = [boxes_at(times[i], record, seen, self.config.detector) for i in shown]
        strip = film_strip(frames[shown], [f"{times[i] * seconds:.1f} s" for i in shown], boxes)
        return render("app_clip.html", name=clip.name, seconds=seconds, seen=seen, frames=strip)

    def respond(self, name, upload, how, question):
        """Asks all checkpoints: yields (frames, one answer for each checkpoint), HTML that grows."""
        answers = {model: "" for model in self.models}
        try:
            clip = self.clip_of(name, upload)
            question, limit = self.question_of(how, question)
            film, record = self.frames(clip, None), None
            yield film, *answers.values()
            if self.detector:
                # what was sent lies in a folder of its own, named by its content
                cache = clip.parent / "evidence" if upload else self.config.evidence_cache
                record = look(clip, self.config.detector, cache, self.detector) | {"seconds": decode_sample(clip, 1)[0]}
                film = self.frames(clip, record)
            for each, model in self.models.items():
                for html in self.answer(each, model, clip, question, limit, record):
                    answers[each] = html
                    yield film, *answers.values()
        except DriveVLMError as error:
            yield problem(error), *answers.values()

    def question_of(self, how, question) -> tuple[str, int]:
        """(the question, the longest answer in tokens)."""
        for mode, info in MODE_TABLE.items():
            if how == mode.capitalize():
                return info.question, info.max_new_tokens
        question = (question or "").strip()
        if not 0 < len(question) <= MAX_QUESTION_LENGTH:
            raise DriveVLMError(f"Write a question, {MAX_QUESTION_LENGTH} characters at most.")
        return question, max(info.max_new_tokens for info in MODE_TABLE.values())

    def answer(self, name, model, clip, question, limit, record):
        """One checkpoint's answer as it is written, then with its objects coloured."""
        begin, text = time.perf_counter(), ""
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        job = Job(self.lock, streamer, lambda: say(model, clip, question, limit, streamer))
        yield render("app_answer.html", name=name, text="", done=False, lines=[], note="")
        for piece in streamer:
            text += piece
            yield render("app_answer.html", name=name, text=text, done=False, lines=[], note="")
        said = job.result()
        found = receipts(said.text, record, self.config.detector, record["seconds"]) if record else []
        spans = [(row["start"], row["end"], row["verdict"], f"{row['what']}: {row['verdict']}") for row in found]
        note = f"{len(said.ids)} tokens in {time.perf_counter() - begin:.1f} s"
        yield render("app_answer.html", name=name, text=highlight(said.text, spans), done=True, lines=lines(found),
                     note=note if said.ended else f"{note}, cut off")


class Job(threading.Thread):
    """A model's answer in a thread of its own, so that the page can follow it."""

    def __init__(self, lock, streamer, function):
        super().__init__(daemon=True)
        self.lock, self.streamer, self.function, self.value, self.error = lock, streamer, function, None, None
        self.start()

    def run(self):
        try:
            with self.lock:
                self.value = self.function()
        except Exception as error:  # shown by whoever asks for the result
            self.error = error
            self.streamer.end()

    def result(self):
        self.join()
        if self.error:
            raise self.error
        return self.value


@torch.no_grad()
def say(model, clip: Path, question: str, limit: int, streamer):
    frames = torch.from_numpy(decode_frames(clip, model.num_frames, model.image_size))[None]  # [1, T, S, S, 3]
    times = [decode_times(clip, model.num_frames)] if model.time_stamps else None
    return model.generate(frames, [question], max_new_tokens=limit, times=times, streamer=streamer)[0]


def problem(error) -> str:
    return render("app_problem.html", text=str(error))


# ---------------------------------------------------------------------------------------------------------------------
# The page


def build_page(desk: Desk):
    """The gradio page."""
    import gradio as gr

    kinds = [*(mode.capitalize() for mode in MODE_TABLE), OWN_WORDS]
    with gr.Blocks(title="Drive-VLM", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(render("app_head.html"))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                name = gr.Dropdown(sorted(desk.clips), value=min(desk.clips), label="Clip", elem_id="clip")
                upload = gr.File(label=f"or your own, up to {desk.config.max_upload_mb} MB", type="filepath",
                                 file_types=sorted(VIDEO_SUFFIXES), elem_id="upload", height=140)
                how = gr.Radio(kinds, value=kinds[0], label="Answer", elem_id="how")
                question = gr.Textbox(label="Question", max_length=MAX_QUESTION_LENGTH, visible=False,
                                      elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=300):
                film = gr.HTML(elem_id="film")
                with gr.Row():
                    answers = [gr.HTML(elem_id=f"answer{k}", min_width=280) for k in range(len(desk.models))]
        asked = [name, upload, how, question]
        options = {"api_visibility": "private", "show_progress": "hidden"}
        how.change(lambda kind: gr.update(visible=kind == OWN_WORDS), how, question, queue=False, **options)
        page.load(desk.show_clip, [name, upload], film, **options)
        name.change(desk.show_clip, [name, upload], film, **options)
        upload.change(desk.show_clip, [name, upload], film, **options)
        # one after another; whoever waits sees their place in the queue
        gr.on([ask.click, question.submit], desk.respond, asked, [film, *answers], concurrency_limit=1,
              **options | {"show_progress": "minimal", "show_progress_on": [film]})
    return page


def launch(page, config, wait: bool = True):
    """Serve the page on this machine alone; with `wait` until Ctrl-C."""
    import gradio as gr

    # gradio's own font has no bold offline
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(max_size=20)
    try:
        page.launch(
            server_name="127.0.0.1", server_port=config.port, share=False, inbrowser=False, quiet=True,
            max_file_size=f"{config.max_upload_mb}mb", prevent_thread_lock=not wait, show_error=False, ssr_mode=False,
            footer_links=[], pwa=False, enable_monitoring=False, theme=gr.themes.Default(**fonts),
            css=page_file("style.css") + page_file("app.css"),
            js="() => document.body.classList.remove('dark')")  # our colours are for a light page
    except OSError as error:
        fail([f"--port: {config.port} is taken ({error})"])


if __name__ == "__main__":
    run_main(main)
