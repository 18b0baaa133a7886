#!/usr/bin/env python3
"""Export a Custom Diffusion result for other tools: as a LoRA, as exact differences, or merged into the model.

    python scripts/export.py results/quickstart --pretrained_model_name_or_path assets/model --output my-cat.safetensors

writes a LoRA for diffusers, A1111, ComfyUI and InvokeAI, and each new word as an embedding beside it. Needs no GPU.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import textwrap
import traceback
from pathlib import Path

WEIGHTS_FILE = "pytorch_custom_diffusion_weights.safetensors"
TRAINED = re.compile(r"(.+\.attn2)\.processor(\.to_[kvq]|\.to_out)_custom_diffusion((?:\.0)?\.(?:weight|bias))")
EXPORTED = "modelspec.sai_model_spec"  # in the metadata of every file that this script writes
RANK = 64


def fail(subject, problem):
    """Ends the run with exit status 1 and one line: which flag or file is wrong, and what to do about it."""
    if os.environ.get("CUSTOM_DIFFUSION_TRACEBACK"):
        traceback.print_exc()
    raise SystemExit(f"error: {subject}: {problem}") from None


@contextlib.contextmanager
def failing_as(subject, remedy):
    """Ends the run with one line whatever a library raises in this context: some raise anything."""
    try:
        yield
    except Exception as error:
        problem = textwrap.shorten(str(error) or type(error).__name__, 400).rstrip(".")
        fail(subject, f"{problem}; {remedy}")


@contextlib.contextmanager
def failing_on_disk(output):
    """Ends the run with one line for what the system refuses in this context: a disk that is full, for example."""
    try:
        yield
    except OSError as error:
        fail(error.filename or output, f"{error.strerror or error}; check its name, permissions and disk")


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = "python scripts/export.py RESULT --pretrained_model_name_or_path MODEL --output FILE [other flags]"
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without the usage: one line
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("result", type=path, metavar="RESULT", help="output_dir of a run, a checkpoint folder, or a hub repository")
    add("--pretrained_model_name_or_path", type=path, required=True, help="base model that the result was trained on")
    add("--revision", help="revision of the base model on the hub")
    add("--variant", help="variant of the base model's weight files, such as fp16")
    add("--output", type=path, required=True, help="NAME.safetensors, or a new folder for --format model")
    add("--format", choices=("lora", "full", "model"), default="lora",
        help='lora (default): for all tools; full: exact differences, LyCORIS "full"; model: merged, a folder')
    add("--rank", type=int, help=f"rank of the LoRA (default: {RANK}); higher loses less and makes a larger file")
    add("--energy", type=float,
        help="instead of --rank: the lowest rank that keeps this share of every layer's squared change, such as 0.99")
    add("--dtype", choices=("fp16", "fp32"), help="precision of the file (default: fp16, for --format model fp32)")
    add("--keep_vocabulary", action="store_true",
        help="with --format model: leave text encoder and tokenizer as they are; the words become embeddings")
    # fmt: on
    args = parser.parse_args(input_args)
    if args.format != "lora" and (args.rank is not None or args.energy is not None):
        parser.error("--rank and --energy are for --format lora")
    if args.rank is not None and args.energy is not None:
        parser.error("give --rank or --energy, not both")
    if args.rank is not None and args.rank < 1:
        parser.error(f"--rank {args.rank}: give 1 or more")
    if args.energy is not None and not 0 < args.energy <= 1:
        parser.error(f"--energy {args.energy}: give more than 0 and at most 1")
    if args.keep_vocabulary and args.format != "model":
        parser.error("--keep_vocabulary is for --format model; the other formats always write the words as embeddings")
    if (Path(args.output).suffix == ".safetensors") == (args.format == "model"):
        wanted = "a folder" if args.format == "model" else "a name that ends in .safetensors"
        parser.error(f"--output {args.output}: give {wanted} for --format {args.format}")
    args.dtype = args.dtype or ("fp32" if args.format == "model" else "fp16")
    return args


if __name__ == "__main__":
    parse_args()  # so that --help and wrong arguments answer before the imports below, which take seconds

with failing_as("packages", "run pip install -r requirements.txt, best in a new environment"):
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from safetensors.torch import save as serialize
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


# ---------- What is read ----------------------------------------------------------------------------------------


def find_folder(name, subject, patterns, revision=None):
    """Returns the folder that `name` is, or that holds what is needed of the hub repository `name`."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        fail(subject, "neither a folder nor a hub repository; check the name")
    with failing_as(subject, "give a folder, or a hub repository within reach"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def read_result(name):
    """Returns the trained weights by the UNet's names for them, {word: embeddings}, and the files they are from.

    A word's embeddings are a dict: {word: (dim,)}, or of SDXL {"clip_l": (1, dim), "clip_g": (1, dim)}.
    """
    folder = find_folder(name, name, ["*.safetensors"])
    file, trained, words = folder / WEIGHTS_FILE, {}, {}
    if not file.is_file():
        remedy = "give the output_dir of a finished run or one of its checkpoints"
        if file.with_suffix(".bin").is_file():  # opening a pickle can run the code in it
            remedy = "only .bin, which this script does not open; train without --no_safe_serialization, or convert "
            remedy += "the files with torch.load(file, weights_only=True) and safetensors.torch.save_file"
        elif checkpoints := sorted(path.parent.name for path in folder.glob(f"checkpoint-*/{WEIGHTS_FILE}")):
            remedy = f"give one of its checkpoints: {', '.join(checkpoints)}"
        fail(name, f"no {WEIGHTS_FILE} in it; {remedy}")
    with failing_as(file, "the file is corrupt; take another checkpoint"):
        table = load_file(file)
    for key, value in table.items():
        if not value.numel():
            continue  # the empty entries are there for diffusers' loader
        match = TRAINED.fullmatch(key)
        if not match:
            fail(file, f"holds {key}, which Custom Diffusion does not train; give a Custom Diffusion result")
        trained["".join(match.groups())] = value.float()
    if not trained:
        fail(file, "no trained weights in it; give a Custom Diffusion result")
    sources = [file]
    for file in sorted(set(folder.glob("*.safetensors")) - set(sources)):
        remedy = "the file is corrupt; take another checkpoint, or move it away if it is not of this result"
        with failing_as(file, remedy), safe_open(file, "pt") as content:
            if EXPORTED in (content.metadata() or {}):
                continue  # an earlier export may lie in the same folder
            # in the order of the text encoders: clip_l, clip_g
            rows = {name: content.get_tensor(name).float() for name in sorted(content.keys(), reverse=True)}
            if {name: row.ndim for name, row in rows.items()} in ({file.stem: 1}, {"clip_l": 2, "clip_g": 2}):
                words[file.stem] = rows
                sources.append(file)
            else:
                print(f"Leaving out {file.name}, which is no embedding of a word called {file.stem}")
    for word, values in ({None: trained} | words).items():
        for key, value in values.items():
            if not value.isfinite().all():
                fail(name, f"{word or key} is not finite; take an earlier checkpoint")
    return trained, words, sources


def read_base(args, subject, names):
    """Returns the base model's own weights in float32, and the configurations of UNet and scheduler.

    Of the weights, those called `names` and the cross-attention's to_k, which says whether a layer was left out. Reads
    these alone and no whole network, so a large model takes little memory.
    """
    stem, variant = "diffusion_pytorch_model", f".{args.variant}" if args.variant else ""
    # one file or several; a variant's parts are called one way by today's diffusers and another way by older ones
    patterns = [f"{stem}{variant}.safetensors", f"{stem}{variant}-*-of-*[0-9].safetensors"]
    patterns.append(f"{stem}-*-of-*[0-9]{variant}.safetensors")
    configs = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    wanted = [*configs, *(f"unet/{pattern}" for pattern in patterns)]
    folder = find_folder(args.pretrained_model_name_or_path, subject, wanted, args.revision)
    with failing_as(subject, "give a Stable Diffusion 1.x, 2.x or XL in diffusers format"):
        index, unet, scheduler = (json.loads((folder / file).read_text("utf-8")) for file in configs)
        kinds = [index.get(part, [None, None])[1] for part in ("unet", "text_encoder", "text_encoder_2")]
    if kinds[:2] != ["UNet2DConditionModel", "CLIPTextModel"] or kinds[2] not in (None, "CLIPTextModelWithProjection"):
        fail(subject, f"a {index.get('_class_name')}; give a Stable Diffusion 1.x, 2.x or XL")
    files = sorted({file for pattern in patterns for file in (folder / "unet").glob(pattern)})
    if not files:
        there = ", ".join(sorted(file.name for file in (folder / "unet").iterdir()))
        remedy = "give --variant fp16 if its files are named so, or a model in .safetensors"
        fail(subject, f"no {patterns[0]} in its unet folder, but {there}; {remedy}")
    base = {}
    for file in files:
        with failing_as(file, "the file is corrupt; download the model again"), safe_open(file, "pt") as content:
            keys = [key for key in content.keys() if key in names or key.endswith(".attn2.to_k.weight")]
            base |= {key: content.get_tensor(key).float() for key in keys}
    return base, unet, scheduler


def subtract(trained, words, base, unet, subject):
    """Returns trained - base by name; fails if the result is of a model with other layers."""
    for name in sorted(trained.keys() | base.keys()):
        ours, theirs = (tuple(table[name].shape) if name in table else "missing" for table in (trained, base))
        if ours != theirs:
            problem = f"{name} is {ours} in the result and {theirs} in this model"
            fail(subject, f"{problem}; give the model that the result was trained on")
    for word, rows in words.items():
        count = sum(row.numel() for row in rows.values())
        if count != unet["cross_attention_dim"]:
            problem = f"{word} has {count} numbers, and this model takes {unet['cross_attention_dim']}"
            fail(subject, f"{problem}; give the model that the result was trained on")
    return {name: value - base[name] for name, value in trained.items()}


# ---------- LoRA and exact differences --------------------------------------------------------------------------


def layer_name(name):
    """kohya's name of a layer, `lora_unet_..._attn2_to_k`, from the UNet's name of its weight or bias."""
    return "lora_unet_" + name.rpartition(".")[0].replace(".", "_")


def factorize(changes, rank, energy):
    """Returns {name: (down (rank, in), up (out, rank))} with up @ down close to the change, and the rank.

    One rank for all layers: with several, diffusers (0.35 to 0.42) scales layers wrongly without saying so. A layer
    whose full rank is lower gets rows and columns of zeros. With `energy` the rank is the lowest at which every layer
    keeps that share of its sum of squares: the singular values' squares add up to it.
    """
    factors, needed = {}, 1
    for name, change in changes.items():
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        factors[name] = (right[:rank], left[:, :rank], values[:rank].sqrt())
        if energy is not None:
            kept = values.double().square().cumsum(0)
            needed = max(needed, 1 + int((kept[:-1] < energy * kept[-1]).sum()))
    rank = needed if energy is not None else min(rank, max(len(values) for _, _, values in factors.values()))
    padded = {}
    for name, (right, left, root) in factors.items():
        down, up = root[:rank, None] * right[:rank], left[:, :rank] * root[:rank]  # of one size: fp16 holds both
        zeros = rank - len(down)
        padded[name] = (torch.nn.functional.pad(down, (0, 0, 0, zeros)), torch.nn.functional.pad(up, (0, zeros)))
    return padded, rank


def make_lora(changes, args):
    """Returns the tensors of a LoRA, the changes that it holds, rounding included, and its rank."""
    weights = {name: change for name, change in changes.items() if change.ndim == 2}
    full_rank = max(min(change.shape) for change in weights.values())
    factors, rank = factorize(weights, full_rank if args.energy is not None else args.rank or RANK, args.energy)
    tensors, held = {}, {}
    for name, (down, up) in factors.items():
        down, up = (factor.to(DTYPES[args.dtype]).contiguous() for factor in (down, up))
        layer = layer_name(name)
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank), dtype=DTYPES[args.dtype])  # tools scale by alpha / rank
        held[name] = up.float() @ down.float()
    return tensors, held, rank


def make_full(changes, args):
    """Returns the tensors of a LyCORIS "full" file, and the changes that it holds, rounding included."""
    held = {name: change.to(DTYPES[args.dtype]).contiguous() for name, change in changes.items()}
    endings = {"weight": "diff", "bias": "diff_b"}
    tensors = {f"{layer_name(name)}.{endings[name.rpartition('.')[2]]}": change for name, change in held.items()}
    return tensors, {name: change.float() for name, change in held.items()}


def norm(tensors):
    """Euclidean norm over all tensors."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def megabytes(count):
    """A number of bytes in words."""
    return f"{count / 1e6:,.{0 if count >= 1e7 else 2}f} MB"


def print_loss(changes, held):
    """Prints which part of the trained change a file lacks: |change - held| / |change| over all and of the worst."""
    lost = {name: norm([changes[name] - value]) for name, value in held.items()}
    shares = {name: value / (norm([changes[name]]) or 1) for name, value in lost.items()}
    overall = norm(torch.tensor(list(lost.values()))) / (norm(changes[name] for name in held) or 1)
    worst = max(shares, key=shares.get)
    print(f"Lost of the trained change: {100 * overall:.3g} % overall, {100 * shares[worst]:.3g} % in {worst}")
    biases = [change for name, change in changes.items() if name not in held]
    if biases:
        share = 100 * norm(biases) / (norm(changes.values()) or 1)
        print(f"Lost besides: the change of {len(biases)} biases ({share:.3g} % of all), which --format full keeps")


# ---------- Metadata and words ----------------------------------------------------------------------------------


def describe(title, kind, words, unet, scheduler):
    """Metadata under the names that kohya's trainer and the ModelSpec use, from which UIs show version and words."""
    # of 1 and 2, 2 alone has linear projections around its attention; its sizes may be those of a small model
    is_v2, is_v = unet.get("use_linear_projection", False), scheduler.get("prediction_type") == "v_prediction"
    size = 8 * unet["sample_size"]
    architecture = "stable-diffusion-v1"
    version = f"sd_v{2 if is_v2 else 1}{'_v' if is_v else ''}"
    if unet.get("addition_embed_type"):
        is_v2, version, architecture = False, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif is_v2:
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    return {
        "format": "pt",
        "ss_base_model_version": version,
        "ss_v2": str(is_v2),
        "ss_output_name": title,
        "ss_tag_frequency": json.dumps({"custom diffusion": {word: 1 for word in words}}),
        EXPORTED: "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.trigger_phrase": ", ".join(words),
    }


def plain_name(word):
    """A word as a file's name: without `<` and `>`, which Windows does not allow. Tools take this name as the word."""
    return re.sub(r'[<>:"/\\|?*]', "", word).strip(" .")


def named(rows, name):
    """A word's embeddings as a file called `name` holds them: SDXL's keep their names."""
    return {name: next(iter(rows.values()))} if len(rows) == 1 else rows


def place_words(words, folder, output, sources):
    """Returns {word: file} of the embeddings to write into `folder`; fails where one would replace another file."""
    placed, taken = {}, {str(output).lower(): "the output file"}
    for word, rows in words.items():
        name = plain_name(word)
        file = folder / f"{name}.safetensors"
        if not name:
            fail(f"word {word}", "nothing is left of it as a file's name; train with another word")
        if str(file).lower() in taken:  # in lower case, as Windows and macOS do not tell capitals apart
            fail(file, f"would be both {taken[str(file).lower()]} and the word {word}; choose another --output")
        taken[str(file).lower()] = f"the word {word}"
        if any(file.exists() and file.samefile(source) for source in sources):
            continue  # a word without < and >, whose embedding lies there already
        if file.exists():
            with failing_as(file, f"move it, or choose an --output in another folder for the word {word}"):
                found, wanted = load_file(file), named(rows, name)
                if found.keys() != wanted.keys() or any(not torch.equal(found[key], wanted[key]) for key in found):
                    raise ValueError("exists and is something else")
        placed[word] = file
    return placed


def write_file(file, content):
    """Writes bytes to a file beside, flushes them to the disk and renames: a file of that name is always complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        with open(unfinished, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)  # it would fill a full disk


def write_words(words, placed, unet, scheduler):
    """Writes each word's embedding as diffusers, A1111, ComfyUI and InvokeAI read it."""
    for word, file in placed.items():
        # those of 1.x and 2.x have one dimension: InvokeAI takes no other for these models
        metadata = describe(file.stem, "textual-inversion", [file.stem], unet, scheduler)
        write_file(file, serialize(named(words[word], file.stem), metadata))


# ---------- The merged model ------------------------------------------------------------------------------------


def add_word(tokenizer, text_encoder, word, embedding, subject):
    """Adds a word as the training does: as typed, capitals included; load_textual_inversion would match others, too."""
    from transformers import AddedToken

    if not tokenizer.add_tokens(AddedToken(word, normalized=False)):
        fail(subject, f"its vocabulary has {word} already; give the model that the result was trained on")
    index = tokenizer.convert_tokens_to_ids(word)
    rows = max(index + 1, text_encoder.get_input_embeddings().num_embeddings)
    text_encoder.resize_token_embeddings(rows, mean_resizing=False)
    text_encoder.get_input_embeddings().weight.data[index] = embedding


def write_model(args, subject, trained, words, unet, scheduler):
    """Writes the base model with the trained weights in its UNet's own layers and, unless told otherwise, the words."""
    with failing_as("packages", "run pip install -r requirements.txt, best in a new environment"):
        import diffusers
        import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    output, options = Path(args.output), {"revision": args.revision, "variant": args.variant}
    with failing_as(subject, "give a complete model in .safetensors, and --variant fp16 if its files are named so"):
        name = args.pretrained_model_name_or_path
        pipeline = diffusers.DiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)
    pipeline.to(torch.float32)
    with torch.no_grad():
        for name, value in trained.items():
            pipeline.unet.get_parameter(name).copy_(value)
        parts = [(pipeline.tokenizer, pipeline.text_encoder)]
        parts += [(pipeline.tokenizer_2, pipeline.text_encoder_2)] if hasattr(pipeline, "text_encoder_2") else []
        for word, rows in () if args.keep_vocabulary else words.items():
            for (tokenizer, text_encoder), row in zip(parts, rows.values(), strict=True):
                add_word(tokenizer, text_encoder, word, row, subject)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        with failing_as(output, "check its disk and permissions"):
            pipeline.to(DTYPES[args.dtype]).save_pretrained(unfinished)
        if args.keep_vocabulary:
            write_words(words, place_words(words, unfinished, output, []), unet, scheduler)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------- The run ---------------------------------------------------------------------------------------------


def export(args):
    """Writes what `args` (from `parse_args`) ask for and says what is lost and how large it is."""
    output, subject = Path(args.output), f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    trained, words, sources = read_result(args.result)
    if output.exists() and (args.format == "model" or output.is_dir()):
        fail(f"--output {output}", "exists; choose another name")
    if output.exists() and any(output.samefile(source) for source in sources):
        fail(f"--output {output}", "a part of the result that is to be exported; choose another name")
    placed = {} if args.format == "model" else place_words(words, output.parent, output, sources)
    base, unet, scheduler = read_base(args, subject, trained.keys())
    changes = subtract(trained, words, base, unet, subject)
    size = norm(changes.values()) / (norm(base[name] for name in changes) or 1)
    moved = f"training changed {len(trained)} tensors by {100 * size:.3g} %"
    print(f"{args.result}: {', '.join(words) or 'no word'}; {moved}")
    if args.format == "model":
        write_model(args, subject, trained, words, unet, scheduler)
        content = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        print(f"Wrote {output}: a model in diffusers format, {args.dtype}, {megabytes(content)}")
        return
    metadata = describe(output.stem, "lora", [plain_name(word) for word in words], unet, scheduler)
    if args.format == "lora":
        tensors, held, rank = make_lora(changes, args)
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{rank}.0"}
        kind = f"a LoRA of rank {rank}"
    else:
        tensors, held = make_full(changes, args)
        metadata |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "full"})}
        kind = 'exact differences (LyCORIS "full")'
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        fail(f"--dtype {args.dtype}", "the change is too large for it; use fp32")
    print_loss(changes, held)
    content = serialize(tensors, metadata)
    write_file(output, content)
    write_words(words, placed, unet, scheduler)
    print(f"Wrote {output}: {kind}, {args.dtype}, {megabytes(len(content))}")
    for word, file in placed.items():
        print(f"Wrote {file}: the embedding of {word}, which other tools call {file.stem}, after the file")


def main(args):
    """Exports; what goes wrong in the machine, not in the program, ends with one line."""
    with failing_on_disk(args.output):
        export(args)


if __name__ == "__main__":
    main(parse_args())
