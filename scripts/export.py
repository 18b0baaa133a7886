#!/usr/bin/env python3
"""Export a Custom Diffusion result for other tools: as a LoRA, as exact differences, or merged into the model.

    python scripts/export.py results/quickstart --pretrained_model_name_or_path assets/model --output my-cat.safetensors

writes a LoRA for diffusers, A1111, ComfyUI and InvokeAI, and each new word as an embedding beside it. Needs no GPU.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -m and -P leave it out

import original_layout
from results import (
    EXPORTED,
    ZERO_SNR,
    Parser,
    add_word,
    check_base,
    fail,
    failing_as,
    find_file,
    find_folder,
    find_weights,
    load_base,
    one_line_errors,
    plain_name,
    read_base,
    read_result,
    start_command,
    subtract,
    unfinished,
    warn,
    write_file,
    written_whole,
)

RANK = 64


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.usage = "python scripts/export.py RESULT --pretrained_model_name_or_path MODEL --output FILE [other flags]"
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("result", type=path, metavar="RESULT", help="output_dir of a run, a checkpoint folder, or a hub repository")
    parser.add_base_model()
    add("--output", type=path, required=True, help="NAME.safetensors, or a new folder for --format model")
    add("--format", choices=("lora", "full", "model", "checkpoint"), default="lora",
        help='lora: for all tools; full: exact differences, LyCORIS "full"; model: merged, a folder; '
        "checkpoint: merged, one file for A1111, ComfyUI, Forge and InvokeAI")
    add("--rank", type=int, help=f"rank of the LoRA (default: {RANK}); higher loses less and makes a larger file")
    add("--energy", type=float,
        help="instead of --rank: the lowest rank that keeps this share of every layer's squared change, such as 0.99")
    add("--dtype", choices=("fp16", "fp32"), help="precision of the file (default: fp16, for --format model fp32)")
    add("--keep_vocabulary", action="store_true",
        help="with --format model: leave text encoder and tokenizer as they are; the words become embeddings")
    # fmt: on
    args = parser.parse_args(input_args)
    check_args(args, parser)
    if args.dtype is None:
        args.dtype = "fp32" if args.format == "model" else "fp16"
    return args


def check_args(args, parser):
    """Ends the run if flags contradict each other."""
    is_model = args.format == "model"
    if args.format != "lora" and (args.rank is not None or args.energy is not None):
        parser.error("--rank and --energy are for --format lora")
    if args.format == "checkpoint" and args.dtype and find_file(args):
        parser.error(
            "--dtype: a checkpoint of a base model that is one file keeps the types of that file; leave it out"
        )
    if args.rank is not None and args.energy is not None:
        parser.error("give --rank or --energy, not both")
    if args.rank is not None and args.rank < 1:
        parser.error(f"--rank {args.rank}: give 1 or more")
    if args.energy is not None and not 0 < args.energy <= 1:
        parser.error(f"--energy {args.energy}: give more than 0 and at most 1")
    if args.keep_vocabulary and not is_model:
        parser.error("--keep_vocabulary is for --format model; the other formats always write the words as embeddings")
    if (Path(args.output).suffix == ".safetensors") == is_model:
        wanted = "a folder" if is_model else "a name that ends in .safetensors"
        parser.error(f"--output {args.output}: give {wanted} for --format {args.format}")


# Wrong arguments are answered before the imports below, which take seconds.
arguments = start_command(parse_args) if __name__ == "__main__" else None

import torch
from safetensors.torch import load_file, save

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


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
    parts = {}
    needed = 1
    for name, change in changes.items():
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        root = values.sqrt()  # Both factors get one, so that they are of one size and fp16 holds both.
        parts[name] = (root[:, None] * right, left * root)
        if energy is not None:
            kept = values.double().square().cumsum(0)
            too_low = int((kept[:-1] < energy * kept[-1]).sum())
            needed = max(needed, 1 + too_low)
    if energy is not None:
        rank = needed
    full_rank = max(len(down) for down, _ in parts.values())
    rank = min(rank, full_rank)
    factors = {}
    for name, (down, up) in parts.items():
        missing = max(0, rank - len(down))
        factors[name] = (
            torch.nn.functional.pad(down[:rank], (0, 0, 0, missing)),
            torch.nn.functional.pad(up[:, :rank], (0, missing)),
        )
    return factors, rank


def make_lora(changes, args):
    """Returns the tensors of a LoRA, the changes that it holds, rounding included, and its rank."""
    dtype = DTYPES[args.dtype]
    weights = {name: change for name, change in changes.items() if change.ndim == 2}
    factors, rank = factorize(weights, args.rank or RANK, args.energy)
    tensors = {}
    held = {}
    for name, (down, up) in factors.items():
        down_weight = down.to(dtype).contiguous()
        up_weight = up.to(dtype).contiguous()
        layer = layer_name(name)
        tensors[f"{layer}.lora_down.weight"] = down_weight
        tensors[f"{layer}.lora_up.weight"] = up_weight
        tensors[f"{layer}.alpha"] = torch.tensor(float(rank), dtype=dtype)  # Tools scale by alpha / rank.
        held[name] = up_weight.float() @ down_weight.float()
    return tensors, held, rank


def make_full(changes, args):
    """Returns the tensors of a LyCORIS "full" file, and the changes that it holds, rounding included."""
    endings = {"weight": "diff", "bias": "diff_b"}
    tensors = {}
    held = {}
    for name, change in changes.items():
        kind = name.rpartition(".")[2]
        rounded = change.to(DTYPES[args.dtype]).contiguous()
        tensors[f"{layer_name(name)}.{endings[kind]}"] = rounded
        held[name] = rounded.float()
    return tensors, held


def norm(tensors):
    """Euclidean norm over all tensors."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def megabytes(count):
    """A number of bytes in words."""
    digits = 0 if count >= 1e7 else 2
    return f"{count / 1e6:,.{digits}f} MB"


def print_loss(changes, held):
    """Prints which part of the change a file lacks: |change - held| / |change|, overall and worst."""
    lost = {name: norm([changes[name] - value]) for name, value in held.items()}
    shares = {name: value / (norm([changes[name]]) or 1) for name, value in lost.items()}
    overall = norm(torch.tensor(list(lost.values()))) / (norm(changes[name] for name in held) or 1)
    worst = max(shares, key=shares.get)
    worst_share = 100 * shares[worst]
    print(f"Lost of the trained change: {100 * overall:.3g} % overall, {worst_share:.3g} % in {worst}")
    biases = [change for name, change in changes.items() if name not in held]
    if biases:
        share = 100 * norm(biases) / (norm(changes.values()) or 1)
        what = f"the change of {len(biases)} biases ({share:.3g} % of all)"
        print(f"Lost besides: {what}, which --format full keeps")


# ---------- Metadata and words ----------------------------------------------------------------------------------


def describe(title, kind, words, base):
    """Metadata for UIs, which show version and words, under the names of kohya's trainer and ModelSpec."""
    is_v = base.scheduler.get("prediction_type") == "v_prediction"
    suffix = "_v" if is_v else ""
    if base.is_xl:
        version = "sdxl_base_v1-0"
        architecture = "stable-diffusion-xl-v1-base"
    elif base.is_v2:
        version = f"sd_v2{suffix}"
        architecture = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    else:
        version = f"sd_v1{suffix}"
        architecture = "stable-diffusion-v1"
    metadata = {
        "format": "pt",
        EXPORTED: "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}" if kind else architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.trigger_phrase": ", ".join(words),
    }
    size = base.unet.get("sample_size")
    if isinstance(size, int):
        metadata["modelspec.resolution"] = f"{8 * size}x{8 * size}"
    if kind:
        metadata["ss_base_model_version"] = version
        metadata["ss_v2"] = str(base.is_v2)
        metadata["ss_output_name"] = title
        metadata["ss_tag_frequency"] = json.dumps({"custom diffusion": {word: 1 for word in words}})
    return metadata


def place_words(words, folder, output, sources):
    """Returns {word: file} of the embeddings to write into `folder`, none of which exists otherwise."""
    placed = {}
    taken = {str(output).lower(): "the output file"}
    for word, rows in words.items():
        name = plain_name(word)
        file = folder / f"{name}.safetensors"
        if not name:
            fail(f"word {word}", "nothing is left of it as a file's name; train with another word")
        path = str(file).lower()  # Windows and macOS do not tell capitals apart.
        if path in taken:
            fail(file, f"would be both {taken[path]} and the word {word}; choose another --output")
        taken[path] = f"the word {word}"
        if not file.exists():
            placed[word] = file
        elif not any(file.samefile(source) for source in sources):
            check_same(file, exported_rows(rows), word)
            placed[word] = file
        # A word without < and > is its own file's name, and its embedding lies there already.
    return placed


def check_same(file, rows, word):
    """Fails if a file does not hold these embeddings of a word."""
    with failing_as(file, f"move it, or choose an --output in another folder for the word {word}", file):
        found = load_file(file)
        is_same = found.keys() == rows.keys()
        if not is_same or any(not torch.equal(found[key], rows[key]) for key in found):
            raise ValueError("exists and is something else")


def exported_rows(rows):
    """A word's embeddings under the names and in the shapes that other tools read. SDXL's keep theirs.

    SD.Next takes a word with one dimension for as many words as it has numbers.
    """
    if len(rows) > 1:
        return rows
    (row,) = rows.values()
    return {"emb_params": row[None]}


def write_words(words, placed, base):
    """Writes each word's embedding as diffusers, A1111, ComfyUI, Forge, InvokeAI and SD.Next read it."""
    for word, file in placed.items():
        metadata = describe(file.stem, "textual-inversion", [file.stem], base)
        write_file(file, save(exported_rows(words[word]), metadata))


def warn_of_names(words):
    """Warns of words that cannot be typed in a tool, as their files' names mean something else there."""
    for word in words:
        name = plain_name(word)
        if re.search(r"\s", name):
            warn(f"word {word}: ComfyUI ends a word at a space; rename its file for ComfyUI")
        if not re.fullmatch("[a-zA-Z0-9., _-]+", name):
            signs = "letters from a to z, digits, and the signs . , _ -"
            warn(f"word {word}: InvokeAI finds only words of {signs}; rename its file for InvokeAI")


def write_card(output, words, folder):
    """Writes what A1111 and InvokeAI show with a LoRA, in files beside it: words to type, and a picture.

    Files that are there are left as they are, as people edit them in A1111.
    """
    contents = {}
    if words:
        contents[".json"] = json.dumps({"activation text": ", ".join(words)}, indent=4).encode()
    picture = folder / "image_0.png"
    if picture.is_file():
        contents[".png"] = picture.read_bytes()
    for suffix, content in contents.items():
        file = output.with_suffix(suffix)
        if not os.path.lexists(file):
            write_file(file, content)
            print(f"Wrote {file}: A1111 and InvokeAI show it with the LoRA")
        elif file.read_bytes() != content:
            print(f"Left {file} as it was")


# ---------- The merged model ------------------------------------------------------------------------------------


def load_merged(args, subject, result, base):
    """Returns the base model's pipeline with the trained weights in its UNet's own layers.

    Its tokenizer and text encoder have the words, unless --keep_vocabulary leaves them as they were.
    """
    pipeline = load_base(args, subject, base)
    set_schedule(pipeline, base.scheduler)
    with torch.no_grad():
        for name, value in result.weights.items():
            pipeline.unet.get_parameter(name).copy_(value)
        if args.keep_vocabulary:
            return pipeline
        parts = [(pipeline.tokenizer, pipeline.text_encoder)]
        if hasattr(pipeline, "text_encoder_2"):
            parts.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        for word, rows in result.words.items():
            for (tokenizer, text_encoder), row in zip(parts, rows.values(), strict=True):
                add_word(tokenizer, text_encoder, word, row, subject)
    return pipeline


def set_schedule(pipeline, wanted):
    """Gives a pipeline a scheduler with these settings, where the model's own has others or lacks them."""
    from diffusers import DDIMScheduler

    config = pipeline.scheduler.config
    names = ("prediction_type", *ZERO_SNR) if wanted.get("rescale_betas_zero_snr") else ("prediction_type",)
    changed = {name: wanted[name] for name in names if wanted.get(name) not in (None, config.get(name))}
    if changed:
        kind = type(pipeline.scheduler) if changed.keys() <= config.keys() else DDIMScheduler
        pipeline.scheduler = kind.from_config(config, **changed)


def write_model(args, subject, result, base):
    """Writes the merged model as a folder, which has its name only when it is complete."""
    output = Path(args.output)
    pipeline = load_merged(args, subject, result, base)
    output.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(output) as place:
        with failing_as(output, "check its disk and permissions"):
            pipeline.to(DTYPES[args.dtype]).save_pretrained(place)
            for folder in place.glob("text_encoder*"):
                name_as_before(folder)
            write_vocabularies(place)
        if args.keep_vocabulary:
            placed = place_words(result.words, place, output, [])
            write_words(result.words, placed, base)
        place.rename(output)


def name_as_before(folder):
    """Gives a saved text encoder the names by which every version of transformers knows its weights.

    From 5.6 on it leaves `text_model.` out of those of one file, and older versions then draw with
    random weights.
    """
    for file in folder.glob("*.safetensors"):
        table = load_file(file)
        outer = ("text_model.", "text_projection.")
        names = {name: name if name.startswith(outer) else f"text_model.{name}" for name in table}
        if any(name != known for name, known in names.items()):
            write_file(file, save({names[name]: value for name, value in table.items()}, {"format": "pt"}))


def write_vocabularies(folder):
    """Writes the two files from which older versions of transformers make a tokenizer, as version 5 leaves them out."""
    for file in folder.glob("tokenizer*/tokenizer.json"):
        model = json.loads(file.read_text("utf-8"))["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        lines = ["#version: 0.2", *merges, ""]
        file.with_name("vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
        file.with_name("merges.txt").write_text("\n".join(lines), "utf-8")


# ---------- One file --------------------------------------------------------------------------------------------


def write_checkpoint(args, subject, result, base):
    """Writes the model with what was trained as one file in the original layout.

    If the base is one file, this is a copy of it in which nothing else changes.
    """
    output = Path(args.output)
    values = {}
    for name, value in result.weights.items():
        values[original_layout.UNET + original_layout.unet_name(name, base.unet)] = value
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(written_whole(output))
        try:
            if not base.file:
                tensors = stack.enter_context(open_parts(args, subject, base))
                metadata = describe(output.stem, "", [plain_name(word) for word in result.words], base)
                write_parts(stream, tensors, values, metadata, base, DTYPES[args.dtype])
            elif base.file.suffix == ".safetensors":
                with open(base.file, "rb") as source:
                    shutil.copyfileobj(source, stream, 1 << 20)
                original_layout.replace_tensors(stream, base.file, values)
            else:
                tensors = stack.enter_context(original_layout.open_tensors(base.file))
                for name, value in values.items():
                    rounded = original_layout.rounded(name, value, tensors[name].dtype)
                    tensors[name] = original_layout.held(rounded)
                original_layout.write_tensors(stream, tensors, None, None)
        except original_layout.TooLarge as error:
            fail(f"--output {output}", f"{error}; use a base model in fp32, of which --dtype fp32 writes such a file")


@contextlib.contextmanager
def open_parts(args, subject, base):
    """Yields {name in the original layout: Tensor} of a base model in diffusers format."""
    parts = ["unet", "vae", "text_encoder"]
    if base.is_xl:
        parts.append("text_encoder_2")
    folder = find_folder(args.pretrained_model_name_or_path, subject, ["vae/config.json"], args.revision)
    with contextlib.ExitStack() as stack:
        tables = {part: {} for part in parts}
        for part in parts:
            for file in find_weights(args, folder, subject, part):
                with failing_as(file, "the file is corrupt; download the model again", file):
                    tables[part] |= stack.enter_context(original_layout.open_tensors(file))
        for part in parts[2:]:
            kept = original_layout.without_added_words(tables[part])
            if kept != tables[part]:
                warn(
                    f"{part}: knows words besides CLIP's, which one file can't hold; export them from their own results"
                )
            tables[part] = kept
        with failing_as(subject, "no tool reads such a model as one file; use --format model"):
            vae = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
            tensors = original_layout.from_unet(tables["unet"], base.unet)
            tensors |= original_layout.from_vae(tables["vae"], len(vae["block_out_channels"]))
            if base.is_xl:
                tensors |= original_layout.from_clip(tables["text_encoder"], "conditioner.embedders.0.transformer.")
                tensors |= original_layout.from_open_clip(tables["text_encoder_2"], "conditioner.embedders.1.model.")
            elif base.is_v2:
                tensors |= original_layout.from_open_clip(tables["text_encoder"], "cond_stage_model.model.")
            else:
                tensors |= original_layout.from_clip(tables["text_encoder"], "cond_stage_model.transformer.")
        yield tensors


def write_parts(stream, tensors, values, metadata, base, dtype):
    """Writes the tensors of a base model as one file, with `values` in the place of those that were trained."""
    for name, value in values.items():
        tensors[name] = original_layout.Tensor(list(value.shape), value.clone)
    # Empty keys tell ComfyUI and Forge what the UNet predicts. In 2.x its weights tell them.
    if base.scheduler.get("prediction_type") == "v_prediction" and not base.is_v2:
        tensors["v_pred"] = original_layout.held(torch.empty(0))
        if base.scheduler.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = original_layout.held(torch.empty(0))
    original_layout.write_tensors(stream, tensors, metadata, dtype)


# ---------- The run ---------------------------------------------------------------------------------------------


def check_output(output, is_model, sources):
    """Fails if the output exists as something that is not to be replaced."""
    if not output.exists():
        return
    if is_model or output.is_dir():
        fail(f"--output {output}", "exists; choose another name")
    if any(output.samefile(source) for source in sources):
        fail(f"--output {output}", "a part of the result, or its base model; choose another name")


def export(args):
    """Writes what `args` (from `parse_args`) ask for and says what is lost and how large it is.

    Raises `results.Problem` or OSError.
    """
    output = Path(args.output)
    is_model = args.format == "model"
    subject = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    result = read_result(args.result)
    file = find_file(args)
    check_output(output, is_model, [*result.files, *([file] if file else [])])
    placed = {} if is_model else place_words(result.words, output.parent, output, result.files)
    base = read_base(args, subject, result.weights.keys())
    # Flags of the training count more than what the model says.
    if "prediction_type" in result.settings:
        base.scheduler["prediction_type"] = result.settings["prediction_type"]
    if result.settings.get("rescale_betas_zero_snr"):
        base.scheduler |= ZERO_SNR
    changes = subtract(result, base.weights, subject)
    check_base(result, base.weights, args.pretrained_model_name_or_path)
    share = norm(changes.values()) / (norm(base.weights[name] for name in changes) or 1)
    moved = f"training changed {len(changes)} tensors by {100 * share:.3g} %"
    print(f"{args.result}: {', '.join(result.words) or 'no word'}; {moved}")
    if is_model:
        write_model(args, subject, result, base)
        written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        print(f"Wrote {output}: a model in diffusers format, {args.dtype}, {megabytes(written)}")
        return
    if args.format == "checkpoint":
        write_checkpoint(args, subject, result, base)
        kind = "a model in the original layout"
    else:
        kind = write_change(args, result, base, changes)
    write_words(result.words, placed, base)
    precision = f"the types of {base.file}" if args.format == "checkpoint" and base.file else args.dtype
    print(f"Wrote {output}: {kind}, {precision}, {megabytes(output.stat().st_size)}")
    for word, file in placed.items():
        print(f"Wrote {file}: the embedding of {word}, which other tools call {file.stem}, after the file")
    warn_of_names(result.words)
    if args.format != "checkpoint":
        write_card(output, [plain_name(word) for word in result.words], result.folder)


def write_change(args, result, base, changes):
    """Writes the trained change as a LoRA or as exact differences; returns in words what it is."""
    output = Path(args.output)
    names = [plain_name(word) for word in result.words]
    metadata = describe(output.stem, "lora", names, base)
    if args.format == "lora":
        tensors, held, rank = make_lora(changes, args)
        metadata["ss_network_module"] = "networks.lora"
        metadata["ss_network_dim"] = str(rank)
        metadata["ss_network_alpha"] = f"{rank}.0"
        kind = f"a LoRA of rank {rank}"
    else:
        tensors, held = make_full(changes, args)
        metadata["ss_network_module"] = "lycoris.kohya"
        metadata["ss_network_args"] = json.dumps({"algo": "full"})
        kind = 'exact differences (LyCORIS "full")'
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        fail(f"--dtype {args.dtype}", "the change is too large for it; use fp32")
    print_loss(changes, held)
    write_file(output, save(tensors, metadata))
    return kind


def main(args):
    """Exports; what goes wrong in the machine, not in the program, ends with one line."""
    with one_line_errors(args.output):
        export(args)


if __name__ == "__main__":
    main(arguments)
