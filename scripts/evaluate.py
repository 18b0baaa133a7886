#!/usr/bin/env python3
"""Compare checkpoints and results: what each has learned, and what it has spoilt.

    python scripts/evaluate.py results/cat results/cat-apart --pretrained_model_name_or_path assets/model \\
        --instance_data_dir assets/instance/cat --output_dir results/cat/evaluation

From the same noise, it draws the base model, every checkpoint of each result, and the result itself.
Each prompt is drawn twice, with "<new1> cat" and with "cat"; the base model, which does not know the
word, draws "cat" for both. It writes all pictures, a sheet, a table, and the line that names the
earliest checkpoint within one standard error of the best.

The measures of a prompt are means over its pictures:

- image alignment: the cosine of CLIP's features of a picture with "<new1> cat" and of an instance
  picture, mean over all pairs; and the same with DINO's features
- text alignment: 2.5 max(cos, 0) of CLIP's features of a picture with "<new1> cat" and of its prompt
  with "cat", as CustomConcept101 has it
- plain class, likeness: the cosine of CLIP's features of a picture with "cat" and of that which the
  base model draws from the same noise
- pixel change: the mean absolute difference from the base model's picture with "cat" from the same
  noise, in levels of 255; of pictures with "<new1> cat", and of those with "cat"

The table shows their means over the prompts, each with its standard error s / sqrt(n), where s is the
standard deviation of the n prompts' values, with n - 1 in its denominator. The prompts are the same in
every row, so rows are compared prompt by prompt: a checkpoint is within one standard error of the best
if the mean difference of their image alignments (DINO) is at most the standard error of this difference.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import sys
import textwrap
from pathlib import Path

# The second folder has the trainer.
sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import original_layout
from results import (
    CHECKPOINT_FILE,
    PACKAGES_REMEDY,
    ZERO_SNR,
    Parser,
    Problem,
    add_word,
    check_base,
    check_name,
    fail,
    failing_as,
    find_result,
    finite,
    load_base,
    one_line_errors,
    read_base,
    read_result,
    start_command,
    subtract,
    write_file,
    written_whole,
)

PROMPTS = [
    "photo of a {}",
    "a {} on the beach",
    "a {} in the snow",
    "a {} on a wooden table",
    "a {} in front of a mountain",
    "a {} at night",
    "a {} on a red background",
    "a {} next to a bicycle",
    "close-up photo of a {}",
    "a watercolor painting of a {}",
]
DEFAULTS = {"num_images": 4, "num_inference_steps": 25, "guidance_scale": 5.0}
# CustomConcept101: 100 pictures of a concept's 20 prompts, by a sampler that adds noise in every step
PROTOCOL = {"num_images": 5, "num_inference_steps": 50, "guidance_scale": 6.0}
COLUMNS = {  # of the table: {measure: (heading, digits)}
    "CLIP-I": ("image alignment, CLIP", 3),
    "DINO": ("image alignment, DINO", 3),
    "CLIP-T": ("text alignment, CLIP", 3),
    "likeness": ("plain class: likeness, CLIP", 3),
    "change": ("word: pixel change", 1),
    "plain change": ("plain class: pixel change", 1),
}
# Mean and deviation of the pixels in the training of CLIP, and of DINO
CLIP_COLORS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
DINO_COLORS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CELL, SHOWN = 176, 4  # pixels of a picture on the sheet, and prompts there


def count(text):
    """argparse type: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    needed = "--pretrained_model_name_or_path MODEL --instance_data_dir DIR"
    parser.usage = f"python scripts/evaluate.py RESULT [RESULT ...] {needed}"
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("results", type=path, nargs="+", metavar="RESULT",
        help="output_dir with its checkpoints, one checkpoint, a merged result, or hub repository")
    parser.add_base_model()
    add("--instance_data_dir", type=path, required=True, help="training's pictures of the concept")
    add("--modifier_token", help="new word that is judged, if the results have several")
    add("--class_prompt", help="the concept's class, if it is to differ from the training")
    add("--prompts", type=path, metavar="FILE",
        help='prompts of your own, one a line, with {} where "<new1> cat" and "cat" are to stand')
    add("--protocol", type=path, nargs=2, metavar=("customconcept101", "FOLDER"),
        help="prompts and settings of this dataset, whose dataset.json lies in the folder")
    add("--output_dir", type=path, default="evaluation", help="folder for table, sheet and pictures")
    add("--clip_model", type=path, default="openai/clip-vit-base-patch32",
        help="folder or hub id of a CLIP")
    add("--dino_model", type=path, default="facebook/dino-vits16",
        help="folder or hub id of a DINO or DINOv2")
    add("--no_metrics", action="store_true",
        help="the sheet and the pixel change alone, without CLIP and DINO")
    for name, kind, text in (
        ("num_images", count, "pictures of each prompt"),
        ("num_inference_steps", count, "steps of the sampler"),
        ("guidance_scale", finite, "how closely pictures follow the prompt"),
    ):
        default = f"(default: {DEFAULTS[name]}; with --protocol {PROTOCOL[name]})"
        add(f"--{name}", type=kind, help=f"{text} {default}")
    add("--sample_batch_size", type=count, default=4, help="pictures drawn at a time")
    add("--seed", type=int, default=0, help="of the noise that pictures start from")
    # fmt: on
    args = parser.parse_args(input_args)
    if args.protocol and args.protocol[0] != "customconcept101":
        parser.error(f"--protocol {args.protocol[0]}: give customconcept101 and its folder")
    if args.protocol and (args.prompts or args.no_metrics):
        problem = "--protocol has its own prompts and needs the metrics"
        parser.error(f"{problem}; leave --prompts and --no_metrics out")
    defaults = PROTOCOL if args.protocol else DEFAULTS
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# Wrong arguments are answered before the imports below, which take seconds.
arguments = start_command(parse_args) if __name__ == "__main__" else None

with one_line_errors("packages"), failing_as("packages", PACKAGES_REMEDY):
    import numpy as np
    import torch
    import transformers
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    from merge import recorded_rest
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    from train_custom_diffusion import draw_table, label_height, load_picture, mend_empty, read_folder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---------- What is compared ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A line of the table. `values` holds {measure: values of all pictures (prompts * images,)}."""

    label: str  # what `read_result` takes, or that it is the base model
    step: float  # of its training; infinite if nothing says it
    result: str | None  # of which it is a checkpoint, or which it is; None for the base model
    phrase: str  # what stands in the prompts, such as "<new1> cat"
    folder: Path  # of its pictures
    values: dict = dataclasses.field(default_factory=dict)

    def files(self, args, kind):
        """The files of its pictures of a kind, "samples" or "plain"."""
        # The base model draws the same for both.
        folder = self.folder / (kind if self.result else "samples")
        numbers = itertools.product(range(len(args.prompts)), range(args.num_images))
        return [folder / f"{prompt:03}_{image}.png" for prompt, image in numbers]

    def pictures(self, args, kind):
        """The pictures of a kind."""
        return [Image.open(file).convert("RGB") for file in self.files(args, kind)]

    def by_prompt(self, name, args):
        """The means of a measure over each prompt's pictures: (prompts,)."""
        return self.values[name].reshape(-1, args.num_images).mean(1)


def read_progress(file):
    """Returns the number of a checkpoint's run in its folder, and its step."""
    with failing_as(file, "the checkpoint is corrupt; move its folder away"):
        record = json.loads(file.read_text("utf-8"))
        return record.get("run", 0), record["step"]


def find_checkpoints(folder):
    """Returns [(step, folder)] of the checkpoints that the latest run in a folder has left."""
    runs = {}
    for file in Path(folder).glob(f"checkpoint-*/{CHECKPOINT_FILE}"):
        place = file.parent
        if not place.name.removeprefix("checkpoint-").isdecimal():
            continue  # a copy that the user keeps
        run, step = read_progress(file)
        runs.setdefault(run, []).append((step, str(place)))
    if not runs:
        return []
    latest = runs.pop(max(runs))
    earlier = [source for checkpoints in runs.values() for _, source in sorted(checkpoints)]
    if earlier:
        print(f"Leaving out what an earlier run has left: {', '.join(earlier)}")
    return sorted(latest)


def find_sources(name):
    """Returns [(step, source)] of a result: its checkpoints, and the finished result."""
    found = find_checkpoints(name)
    if not found:
        own = Path(name, CHECKPOINT_FILE)
        step = read_progress(own)[1] if own.is_file() else math.inf
        return [(step, name)]
    try:
        find_result(name)
    except Problem:
        print(f"{name}: no finished result in it, so its checkpoints are compared")
        return found
    final = read_result(name)
    last = read_result(found[-1][1])
    if final.settings and final.settings != last.settings:
        print(f"Leaving out the checkpoints in {name}: an earlier run with other settings has left them")
        return [(math.inf, name)]
    step = math.inf
    is_alike = final.weights.keys() == last.weights.keys()
    if is_alike and all(torch.equal(value, last.weights[key]) for key, value in final.weights.items()):
        step = found.pop()[0]  # The last checkpoint is the result.
    return [*found, (step, name)]


def find_rows(args):
    """Returns the rows of the base model and of all results.

    Sets what the command line leaves open: the word, the class, and as `args.record` how the model is
    to be used. Every result is read, so that a broken one shows before pictures are drawn.
    """
    rows = []
    pictures = Path(args.output_dir, "pictures")
    for name in map(os.path.normpath, args.results):
        for step, source in find_sources(name):
            result = read_result(source)
            check_record(args, result)
            word = find_word(args, result)
            args.modifier_token = args.modifier_token or word
            args.class_prompt = args.class_prompt or find_class(result, word)
            names = dict.fromkeys([Path(name).name, Path(source).name])
            folder = pictures / " ".join([f"{len(rows) + 1:02}", *names])
            rows.append(Row(source, step, name, f"{word} {args.class_prompt}", folder))
    base = Row("base model", -1, None, args.class_prompt, pictures / "00 base model")
    return [base, *rows]


def check_record(args, result):
    """Fails if a result was trained for another use of the model than the first one was."""
    names = ("clip_skip", "prediction_type", "rescale_betas_zero_snr")
    record = {name: result.settings.get(name) or None for name in names}
    for name, value in record.items():
        first = args.record.setdefault(name, value)
        if value != first:
            problem = f"trained with {name} {value}, as it records, and {args.results[0]} with {first}"
            fail(result.name, f"{problem}; compare results of one")


def find_word(args, result):
    """Returns the word of a result that is judged: --modifier_token, or its only or first one."""
    words = list(result.words)
    wanted = args.modifier_token
    if not words:
        fail(result.name, "no word in it; give a result that was trained with --modifier_token")
    if wanted and len(words) > 1 and wanted not in words:
        fail(result.name, f"no word {wanted} in it; give --modifier_token {' or '.join(words)}")
    return wanted if wanted in words else words[0]


def find_class(result, word):
    """Returns the class that stands behind a word in the prompts of its training."""
    rest = recorded_rest(result, word) or ""
    if not rest.strip():
        problem = f"does not record the class behind {word}"
        fail(result.name, f"{problem}; give it: --class_prompt cat")
    return rest.strip()


# ---------- Prompts and instance pictures -----------------------------------------------------------------------


def read_prompts(args):
    """Sets `args.prompts` to a list of prompts, with {} for what is drawn."""
    if not args.prompts and not args.protocol:
        args.prompts = PROMPTS
        return
    file = find_protocol(args) if args.protocol else Path(args.prompts)
    subject = f"--protocol: {file}" if args.protocol else f"--prompts {file}"
    with failing_as(subject, "give a text file in UTF-8, one prompt a line", file):
        lines = file.read_text("utf-8-sig").splitlines()
    args.prompts = [line.strip() for line in lines if line.strip()]
    wrong = [prompt for prompt in args.prompts if "{}" not in prompt]
    if wrong or not args.prompts:
        problem = f"no {{}} in {wrong[0]!r}" if wrong else "no prompt in it"
        fail(subject, f'{problem}; write {{}} where "<new1> cat" is to stand')


def find_protocol(args):
    """Returns CustomConcept101's file of prompts for --instance_data_dir, and sets its class."""
    folder = Path(args.protocol[1])
    file = folder / "dataset.json"
    name = Path(args.instance_data_dir).resolve().name
    remedy = "give the folder customconcept101 of the dataset's repository"
    with failing_as(f"--protocol {file}", remedy, folder):
        concepts = json.loads(file.read_text("utf-8"))
        names = [Path(concept["instance_data_dir"]).name for concept in concepts]
        if name not in names:
            problem = f"{file} has no concept with a folder of this name"
            fail(f"--instance_data_dir {name}", f"{problem}; call it as there, such as {min(names)}")
        concept = concepts[names.index(name)]
        args.class_prompt = args.class_prompt or concept["class_prompt"]
        return folder / concept["prompt_filename"]


def read_instances(folder):
    """Returns the pictures of a folder as the training reads them, masks left out."""
    files = [file for file, _ in read_folder(Path(folder), "--instance_data_dir", "").samples]
    if not files:
        remedy = mend_empty(Path(folder), "give the folder of the training")
        fail(f"--instance_data_dir {folder}", f"no pictures in it; {remedy}")
    pictures = []
    for file in files:
        with failing_as(file, "remove it, or save it again", file):
            pictures.append(load_picture(file)[0])
    return pictures


# ---------- CLIP and DINO ---------------------------------------------------------------------------------------


def load_metric(flag, name, kind):
    """Loads a model for a measure; fails if its files are of another kind."""
    subject = f"{flag} {name}"
    check_name(name, subject)
    remedy = "give a folder or a hub id within reach, or add --no_metrics"
    with failing_as(subject, remedy, Path(name)):
        model, report = kind.from_pretrained(name, output_loading_info=True)
    # Transformers makes up what the files lack. DINO's lack a pooling layer, which is not used.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        problem = f"{missing[0]} is not in its files"
        fail(subject, f"{problem}; give a model of the kind {kind.__name__}")
    return model.float().eval().to(DEVICE)


def prepare(picture, short, side, colors):
    """The middle of a picture whose shorter side is `short` pixels: (1, 3, side, side)."""
    least = min(picture.size)
    width, height = (int(length * short / least) for length in picture.size)
    left = round((width - side) / 2)
    top = round((height - side) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    middle = resized.crop((left, top, left + side, top + side))
    mean, deviation = np.array(colors, np.float32)
    pixels = (np.asarray(middle, np.float32) / 255 - mean) / deviation
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(DEVICE)


def unit(features):
    """Features (1, dim) below each other as unit vectors: (n, dim), float64."""
    rows = torch.cat(features).double().cpu().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pooled(output):
    """CLIP's features; transformers 5 returns them in an object."""
    return getattr(output, "pooler_output", output)


class Judge:
    """CLIP and DINO, and what they see in the instance pictures. Features are unit vectors, (n, dim)."""

    def __init__(self, args, instances):
        clip = args.clip_model
        dino = args.dino_model
        self.clip = load_metric("--clip_model", clip, transformers.CLIPModel)
        self.dino = load_metric("--dino_model", dino, transformers.AutoModel)
        with failing_as(f"--clip_model {clip}", "give a complete CLIP", Path(clip)):
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
            self.read(["cat"])
            self.instances = {"CLIP-I": self.clip_features(instances)}
        with failing_as(f"--dino_model {dino}", "give a DINO or DINOv2", Path(dino)):
            self.instances["DINO"] = self.dino_features(instances)

    @torch.no_grad()
    def clip_features(self, pictures):
        """CLIP's features of pictures."""
        side = self.clip.config.vision_config.image_size
        features = []
        for picture in pictures:
            pixels = prepare(picture, side, side, CLIP_COLORS)
            features.append(pooled(self.clip.get_image_features(pixel_values=pixels)))
        return unit(features)

    @torch.no_grad()
    def dino_features(self, pictures):
        """DINO's features of pictures: its class token."""
        side = min(224, self.dino.config.image_size)  # DINOv2 says more, and takes any.
        features = []
        for picture in pictures:
            pixels = prepare(picture, round(side * 256 / 224), side, DINO_COLORS)
            hidden = self.dino(pixel_values=pixels).last_hidden_state
            if hidden.ndim != 3:
                raise ValueError("no vision transformer")
            features.append(hidden[:, 0])
        return unit(features)

    @torch.no_grad()
    def read(self, prompts):
        """CLIP's features of prompts."""
        length = self.clip.config.text_config.max_position_embeddings
        options = {"truncation": True, "max_length": length, "return_tensors": "pt"}
        features = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, **options).input_ids.to(DEVICE)
            features.append(pooled(self.clip.get_text_features(input_ids=ids)))
        return unit(features)


# ---------- Drawing ---------------------------------------------------------------------------------------------


def load_pipeline(args):
    """Returns the base model's pipeline with the sampler that the pictures are drawn with."""
    base = read_base(args, subject_of(args), set())
    pipeline = load_base(args, subject_of(args), base)
    pipeline.safety_checker = None
    wanted = dict(base.scheduler)
    wanted |= {name: value for name, value in args.record.items() if value is not None}
    if wanted.get("rescale_betas_zero_snr"):
        wanted |= ZERO_SNR
    schedule = {name: wanted[name] for name in ("prediction_type", *ZERO_SNR) if name in wanted}
    kind = DPMSolverMultistepScheduler
    if args.protocol:
        kind = DDIMScheduler
        schedule |= {"clip_sample": False, "set_alpha_to_one": False}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **schedule)
    if args.record["clip_skip"] and not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers' clip_skip looks for what transformers 5.6 has no more; as a module it would be its own part.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(DEVICE)


def subject_of(args):
    """What a line about the base model starts with."""
    return f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"


@contextlib.contextmanager
def loaded(pipeline, result, args):
    """Puts a result into the base model's own layers and vocabulary, and takes it out again to the bit.

    Yields what the layers of the base model hold, {name: tensor}.
    """
    subject = subject_of(args)
    state = pipeline.unet.state_dict()
    keys = [name for name in state if name.endswith(original_layout.KEYS)]
    trained = {*keys, *result.weights} & state.keys()
    base = {name: state[name].cpu().clone() for name in trained}
    subtract(result, base, subject)  # It refuses other layers.
    endings = ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",)
    encoders = [getattr(pipeline, f"text_encoder{ending}") for ending in endings]
    sizes = [encoder.get_input_embeddings().num_embeddings for encoder in encoders]
    tokenizers = {}
    for ending in endings:
        name = f"tokenizer{ending}"
        tokenizers[name] = getattr(pipeline, name)
        setattr(pipeline, name, copy.deepcopy(tokenizers[name]))
    try:
        pipeline.unet.load_state_dict(result.weights, strict=False)
        for word, rows in result.words.items():
            for name, encoder, row in zip(tokenizers, encoders, rows.values(), strict=True):
                add_word(getattr(pipeline, name), encoder, word, row, subject)
        yield base
    finally:
        pipeline.unet.load_state_dict(base, strict=False)
        for encoder, size in zip(encoders, sizes, strict=True):
            encoder.resize_token_embeddings(size, mean_resizing=False)
        for name, tokenizer in tokenizers.items():
            setattr(pipeline, name, tokenizer)


def fill(args, phrase):
    """The prompts with a phrase, each as often as it is drawn."""
    return [prompt.replace("{}", phrase) for prompt in args.prompts for _ in range(args.num_images)]


def draw(pipeline, args, phrase, files):
    """Draws the prompts with a phrase into files; the noise follows from the seed and the file's place."""
    prompts = fill(args, phrase)
    options = {"num_inference_steps": args.num_inference_steps}
    options |= {"guidance_scale": args.guidance_scale, "clip_skip": args.record["clip_skip"]}
    options |= {"eta": 1.0}  # With it, DDIM adds noise as DDPM does.
    seeds = range(1000 * args.seed, 1000 * args.seed + len(files))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for start in range(0, len(files), args.sample_batch_size):
        batch = slice(start, start + args.sample_batch_size)
        with failing_as("drawing", "lower --sample_batch_size if memory is short"):
            images = pipeline(prompts[batch], generator=generators[batch], **options).images
        for file, image in zip(files[batch], images, strict=True):
            with written_whole(file) as stream:
                image.save(stream, format="PNG")


def draw_row(pipeline, args, row, is_first):
    """Draws a row's pictures, and writes the prompts.json with which CustomConcept101's script reads them.

    `is_first` is true for the first row of each result.
    """
    samples = row.files(args, "samples")
    if row.result:
        result = read_result(row.label)
        with loaded(pipeline, result, args) as base:
            if is_first:
                check_base(result, base, args.pretrained_model_name_or_path)
            draw(pipeline, args, row.phrase, samples)
            draw(pipeline, args, args.class_prompt, row.files(args, "plain"))
    else:
        draw(pipeline, args, args.class_prompt, samples)
    names = [file.stem for file in samples]
    prompts = dict(zip(names, fill(args, args.class_prompt), strict=True))
    write_file(row.folder / "prompts.json", json.dumps(prompts, indent=1).encode())


# ---------- Measures and what is written ------------------------------------------------------------------------


def changes(pictures, before):
    """Mean absolute differences of pictures' pixels from those before, in levels of 255: (n,)."""
    found = []
    for new, old in zip(pictures, before, strict=True):
        difference = np.asarray(new, float) - np.asarray(old, float)
        found.append(np.abs(difference).mean())
    return np.array(found)


def measure(judge, samples, plain, before, texts):
    """Returns {measure: (n,)} of pictures with the word and of the plain class.

    `before` are the base model's pictures of the plain class, and `texts` their prompts.
    """
    values = {"change": changes(samples, before), "plain change": changes(plain, before)}
    if judge:
        seen = {"CLIP-I": judge.clip_features(samples), "DINO": judge.dino_features(samples)}
        for name, features in seen.items():
            values[name] = (features @ judge.instances[name].T).mean(1)
        values["CLIP-T"] = 2.5 * (seen["CLIP-I"] * judge.read(texts)).sum(1).clip(0)
        moved = judge.clip_features(plain) - judge.clip_features(before)
        # The cosine of unit vectors; exactly 1 where nothing moved.
        values["likeness"] = 1 - (moved**2).sum(1) / 2
    return values


def standard_error(values):
    """The standard error of the mean of independent values; None of a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def find_earliest(rows, args):
    """Returns the earliest row within one standard error of the best (by DINO), and the best."""
    best = max(rows, key=lambda row: row.values["DINO"].mean())
    as_good = []
    for row in rows:
        lost = best.by_prompt("DINO", args) - row.by_prompt("DINO", args)
        if lost.mean() <= (standard_error(lost) or 0):
            as_good.append(row)
    return min(as_good, key=lambda row: row.step), best


def cell(row, name, args):
    """A measure's mean and its standard error, as the table shows them."""
    digits = COLUMNS[name][1]
    values = row.by_prompt(name, args)
    error = standard_error(values)
    shown = f"{values.mean():.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


def table(rows, args):
    """The table in Markdown, and below it the line about the earliest row that is good enough."""
    names = [name for name in COLUMNS if name in rows[0].values]
    headings = [COLUMNS[name][0] for name in names]
    lines = [["", *headings], ["---"] * (1 + len(names))]
    lines += [[row.label, *(cell(row, name, args) for name in names)] for row in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = "Without CLIP and DINO, no number says which is best; look at sheet.png"
    if len(rows) > 1 and not args.no_metrics:
        earliest, best = find_earliest(rows[1:], args)
        scores = [f"{row.label}, {cell(row, 'DINO', args)}" for row in (earliest, best)]
        said = f"Earliest within one standard error of the best image alignment (DINO): {scores[0]}"
        said += "" if earliest is best else f"; the best is {scores[1]}"
    return f"{text}\n\n{said}\n"


def report(rows, args):
    """Writes what the rows so far say: table.md, evaluation.json and sheet.png."""
    folder = Path(args.output_dir)
    write_file(folder / "table.md", table(rows, args).encode())
    found = []
    for row in rows:
        step = row.step if row.step < math.inf else None
        entry = {"label": row.label, "step": step, "phrase": row.phrase}
        entry["pictures"] = str(row.folder)
        for name in row.values:
            values = row.by_prompt(name, args)
            entry[name] = {"mean": values.mean(), "standard error": standard_error(values)}
            entry[name]["by prompt"] = list(values)
        found.append(entry)
    content = json.dumps({"settings": vars(args), "rows": found}, indent=1)
    write_file(folder / "evaluation.json", content.encode())
    with written_whole(folder / "sheet.png") as stream:
        draw_rows(rows, args).save(stream, format="PNG")


def draw_rows(rows, args):
    """The sheet: the first picture of the first prompts, at the right with the plain class."""
    phrases = {"samples": rows[-1].phrase, "plain": args.class_prompt}
    shown = slice(0, SHOWN * args.num_images, args.num_images)
    halves = []
    for kind, phrase in phrases.items():
        texts = [textwrap.fill(text, 24) for text in fill(args, phrase)[shown]]
        pictures = {}
        for row in rows:
            label = row.label if kind == "samples" else f'{row.label}, "{phrase}"'
            squares = [
                ImageOps.pad(picture, (CELL, CELL), color="white") for picture in row.pictures(args, kind)[shown]
            ]
            pictures[label] = squares
        table = draw_table(pictures, headings=())
        # Without its line for headings, which are drawn in several lines here.
        table = table.crop((0, label_height(CELL), *table.size))
        halves.append((draw_texts(texts), table))
    width = table.width + 16
    height = max(head.height for head, _ in halves)
    sheet = Image.new("RGB", (2 * width - 16, height + table.height), "white")
    for place, (head, half) in enumerate(halves):
        sheet.paste(head, (place * width, height - head.height))
        sheet.paste(half, (place * width, height))
    return sheet


def draw_texts(texts):
    """A line of texts, each as wide as a picture."""
    height = 18 * max(text.count("\n") + 1 for text in texts) + 8
    head = Image.new("RGB", (CELL * len(texts), height), "white")
    pen = ImageDraw.Draw(head)
    font = ImageFont.load_default(14)
    for place, text in enumerate(texts):
        corner = (CELL * place + 4, height - 4)
        pen.multiline_text(corner, text, "black", font, anchor="ld", spacing=3)
    return head


# ---------- The run ---------------------------------------------------------------------------------------------


def evaluate(args):
    """Draws and measures what `args` (from `parse_args`) describe. Raises `results.Problem` or OSError."""
    args.record = {}
    read_prompts(args)
    instances = read_instances(args.instance_data_dir)
    rows = find_rows(args)
    transformers.utils.logging.disable_progress_bar()
    judge = None if args.no_metrics else Judge(args, instances)
    pipeline = load_pipeline(args)
    texts = fill(args, args.class_prompt)
    checked = set()
    for place, row in enumerate(rows, 1):
        print(f"Drawing {row.label} ({place} of {len(rows)})")
        draw_row(pipeline, args, row, is_first=row.result not in checked)
        checked.add(row.result)
        samples = row.pictures(args, "samples")
        plain = row.pictures(args, "plain")
        before = rows[0].pictures(args, "plain")
        row.values = measure(judge, samples, plain, before, texts)
        report(rows[:place], args)
    print(f"\n{table(rows, args)}")


def main(args):
    """Evaluates; what goes wrong in the machine, not in the program, ends with one line."""
    with one_line_errors(args.output_dir):
        evaluate(args)
    print(f"Wrote {args.output_dir}: table.md, evaluation.json, sheet.png and the pictures")


if __name__ == "__main__":
    main(arguments)
