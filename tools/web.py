"""Ask models in a browser, and look inside them.

    python -m tools.web                                            the newest model under out/
    python -m tools.web --model=out/dense/model,out/comm/model     two models side by side
    python -m tools.web --model=llava-hf/llava-1.5-7b-hf           whatever sample.py takes
    python -m tools.web --host=0.0.0.0                             also for other computers

    an image or a scene, and a question
      | Ask       the answer of each model as it is written, and its boxes drawn on the image
      | Look      the page of tools/look.py: sliders over layers, and over blocks and heads

The page is made with gradio (requirements-extra.txt) and needs no network. Nothing is sent or kept:
gradio's telemetry, web fonts and history are off, and uploads are deleted at the end. An upload has
at most 50 MB and Pillow's limit of pixels. One request is computed at a time.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from functools import partial
from html import escape

from common import cli
from common.cli import option
from common.draw import COLORS
from common.errors import InputError
from common.images import open_image, parse_boxes
from interop.load import load_to_answer
from sample import stream_answer
from tools.look import make_page, model_sections, with_boxes
from toy.scenes import scene_to_ask

try:
    import gradio as gr
except ImportError:
    gr = None

SIDE = 448  # of the image with boxes, in pixels
QUEUE = {"concurrency_id": "models", "concurrency_limit": 1}
# A frame, so that the page's script runs, and nothing of it can reach gradio's page.
FRAME = """<iframe sandbox="allow-scripts" srcdoc="{}"
style="width: 100%; height: 1000px; border: 0; background: white"></iframe>"""


@dataclass
class Config:
    model: list[str] = option([], "folders or hub ids of models; default: the newest under out/")
    host: str = option("127.0.0.1", "the address to listen on; 0.0.0.0: all of this computer")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


def open_upload(file):
    """Open the image of the page -> PIL image. Raises gr.Error, which the page shows."""
    try:
        if not file:
            raise InputError("no image: drop one, or choose a scene")
        return open_image(file)
    except InputError as error:
        # without a traceback in the terminal
        raise gr.Error(str(error), print_exception=False) from None


def ask(model, file, question):
    """Yield the answer so far and the image, at the end with the boxes of the answer."""
    image, text = open_upload(file), ""
    yield text, with_boxes(image, [], SIDE)
    for piece in stream_answer(model, [image], [(question, None)], max_new_tokens=128):
        text += piece
        yield text, gr.skip()
    boxes = [(COLORS[0], box) for box in parse_boxes(text)]
    yield text, with_boxes(image, boxes, SIDE)


def look(name, model, file, question):
    """Return the page of tools/look.py as HTML."""
    sections = model_sections(model, open_upload(file), [(question, None)])
    return FRAME.format(escape(make_page(name, sections)))


def draw_scene(index):
    """Draw a test scene -> its image, and questions to choose from."""
    [image], questions = scene_to_ask(index)
    return image, gr.Dropdown(questions, value=questions[-1])


def add_answers(models, inputs):
    """Add a button, and for each of [(name, MLLM)] its answer and the image with its boxes."""
    button = gr.Button("Ask", variant="primary")
    with gr.Row():
        for name, model in models:
            with gr.Column(min_width=160):
                text = gr.Textbox(label=name)
                image = gr.Image(
                    label="Boxes of the answer",
                    format="png",
                    interactive=False,
                )
            button.click(partial(ask, model), inputs, [text, image], **QUEUE)


def build(models):
    """Build the page of models [(name, MLLM)]."""
    with gr.Blocks(title="nanoMLLM", analytics_enabled=False) as page:
        gr.Markdown("# nanoMLLM")
        with gr.Row():
            with gr.Column():
                # A file, which open_image checks before it decodes it. PNG keeps a scene's pixels.
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    format="png",
                    sources=["upload", "clipboard"],
                    height=300,
                    elem_id="image",
                )
                scene = gr.Number(0, label="Test scene of the toy world", precision=0, minimum=0)
                question = gr.Dropdown(label="Question", allow_custom_value=True)
            with gr.Column(scale=2):
                with gr.Tab("Ask"):
                    add_answers(models, [image, question])
                with gr.Tab("Look inside"):
                    button = gr.Button("Look inside", variant="primary")
                    frame = gr.HTML()
                    button.click(partial(look, *models[0]), [image, question], frame, **QUEUE)
        for event in (page.load, scene.change):
            event(draw_scene, scene, [image, question])
    return page


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if gr is None:
        raise InputError("the page needs gradio: pip install -r requirements-extra.txt")
    try:
        # gradio would try a hundred ports of an address that this computer does not have.
        socket.create_server((config.host, 0)).close()
    except OSError as error:
        raise InputError(f"--host={config.host}: cannot listen there ({error})") from None
    names = config.model or [""]
    models = [load_to_answer(cli.ModelConfig(name, config.device)) for name in names]
    # gradio writes uploads and drawn images here.
    with tempfile.TemporaryDirectory() as os.environ["GRADIO_TEMP_DIR"]:
        build(models).launch(
            server_name=config.host,
            share=False,
            show_error=True,
            max_file_size=50_000_000,
            run_history=False,
            footer_links=[],
            # Enlarge a scene, which has 64 x 64 pixels.
            css="#image .upload-container { width: 100% } #image img { object-fit: contain }",
            theme=gr.themes.Default(font="sans-serif", font_mono="monospace"),
        )


if __name__ == "__main__":
    cli.run(main)
