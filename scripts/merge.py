#!/usr/bin/env python3
"""Join concepts that were trained apart, or keep one concept apart from the rest of the model, in closed form.

One result: the new word keeps what it has learned, and everything else goes back towards what it was:
    python scripts/merge.py results/cat --pretrained_model_name_or_path assets/model --output_dir results/cat-apart

Several results: their words work together in one model:
    python scripts/merge.py results/cat results/pot --pretrained_model_name_or_path assets/model \\
        --rename "results/pot:<new1>=<new2>" --output_dir results/merged

Takes minutes on a CPU, and needs neither a GPU nor pictures: keys and values of the cross-attention see text features
alone.
"""

import argparse
import functools
import io
import json
import os
import re
import sys
from pathlib import Path

OPENINGS = (
    "photo of a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a {}",
    "{}",
    "my {}",
    "a painting of a {}",
    "a cute {}",
    "the {}",
    "one small {}",
    "photo of my {}",
)
ENDINGS = (
    "",
    " on the beach",
    " in a garden",
    " at night",
    " on a table",
    " on a white background",
    " next to a house",
    " on the grass",
    " in the snow",
    " at sunset",
    " on a red background",
    " on a blue background",
    " in front of a brick wall",
    " in front of a green wall",
    " in a meadow",
    " in a box",
    " under a tree",
    " in the city",
    " in a room",
    " on the street",
    " in front of a mountain",
    " with a hat",
)
PADDING = 10  # tokens after the end that count: they see the whole prompt, but all 60 would outweigh its words
CAPTIONS = Path(__file__).with_name("captions.txt")


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.usage = (
        "python scripts/merge.py RESULT [RESULT ...] --pretrained_model_name_or_path MODEL --output_dir FOLDER"
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # without the usage: one line
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("results", type=path, nargs="+", metavar="RESULT", help="output_dir, checkpoint, or hub repository")
    add("--pretrained_model_name_or_path", type=path, required=True, help="base model of the results")
    add("--revision", help="revision of the base model on the hub")
    add("--variant", help="variant of the base model's weight files, such as fp16")
    add("--output_dir", type=path, required=True, help="folder for the new result")
    add("--rename", nargs="+", default=[], metavar="RESULT:OLD=NEW", help="other words, if two results share one")
    add("--weight", type=float, default=10.0, help="of the concepts; higher keeps more of them and less of the rest")
    add("--class_weight", type=float, default=4.0, help="of the same prompts without the new word")
    add("--captions", type=path, default=CAPTIONS, help="file of captions that are to stay as they are, one a line")
    add("--concepts", nargs="+", metavar="PHRASE", help='each word with its class, "<new1> cat"; default: as trained')
    add("--ridge", type=float, default=1e-2, help="keeps the weights small where no prompt says what they should be")
    add("--method", choices=("least_squares", "paper"), default="least_squares",
        help="paper: the concepts are kept exactly, whatever that costs the rest")
    # fmt: on
    for action in parser._actions:  # argparse's formatter with defaults would say "(default: None)" and "[]", too
        action.help += "" if action.default in (None, [], argparse.SUPPRESS) else " (default: %(default)s)"
    return parser.parse_args(input_args)


if __name__ == "__main__":
    parse_args()  # so that --help and wrong arguments answer before the imports below, which take seconds

import torch
from export import (
    WEIGHTS_FILE,
    add_word,
    fail,
    failing_as,
    failing_on_disk,
    named,
    read_base,
    read_result,
    subtract,
    write_file,
)
from safetensors import safe_open
from safetensors.torch import save as serialize

# ---------- The closed form -------------------------------------------------------------------------------------


def gram(features):
    """Mean of f^T f over the rows of features (n, dim): (dim, dim)."""
    return features.T @ features / len(features)


def filters(concepts, classes, captions, weight, class_weight, ridge):
    """Returns a matrix (dim, dim) for each concept by which its trained change of any key or value is multiplied.

    `concepts` and `classes` are lists of text features (n, dim), of prompts with the new word and of the same prompts
    without it; `captions` (n, dim) are those of everything else. The new weights W minimize

        ridge s |W - W0|^2 + mean |(W - W0) r|^2 + class_weight sum_i mean |(W - W0) c_i|^2
            + weight sum_i mean |(W - W_i) f_i|^2

    over the features r of captions, c_i of classes and f_i of concepts, where W0 are the base model's weights, W_i
    those trained for concept i, and s the mean square of a number in r. The minimum is W = W0 + sum_i (W_i - W0) M_i
    with M_i = weight G_i A^-1, where G_i is the mean of f_i^T f_i and A the sum of all four terms' means: the same
    matrices for every layer.
    """
    wanted = [weight * gram(features) for features in concepts]
    kept = gram(captions) + ridge * captions.square().mean() * torch.eye(captions.shape[1], dtype=captions.dtype)
    kept = kept + class_weight * sum(gram(features) for features in classes)
    return [torch.linalg.solve(kept + sum(wanted), matrix).T for matrix in wanted]


def exact_filters(concepts, captions, ridge):
    """The same by Kumari et al. (2023), section 3.3: W f = W_i f for every feature of a concept, as a constraint.

    Among such weights, those that move the captions' keys and values least. Nearly equal features contradict each other
    where concepts differ, so `ridge` softens the constraints.
    """
    targets = torch.cat(concepts)
    directions = torch.linalg.solve(gram(captions) + 1e-6 * torch.eye(captions.shape[1]).double(), targets.T).T
    inverse = torch.linalg.solve(targets @ directions.T + ridge * torch.eye(len(targets)).double(), directions)
    parts = inverse.split([len(features) for features in concepts])
    return [features.T @ part for features, part in zip(concepts, parts, strict=True)]


# ---------- Text features ---------------------------------------------------------------------------------------


def load_text_parts(args, words, is_xl):
    """Returns (tokenizer, text encoder) of the base model, or SDXL's two pairs, float32, with the words' embeddings."""
    with failing_as("packages", "run pip install -r requirements.txt, best in a new environment"):
        import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name, options, parts = args.pretrained_model_name_or_path, {"revision": args.revision}, []
    subject = f"--pretrained_model_name_or_path {name}"
    kinds = {"": transformers.CLIPTextModel} | ({"_2": transformers.CLIPTextModelWithProjection} if is_xl else {})
    for i, (ending, kind) in enumerate(kinds.items()):
        more = {"variant": args.variant, "use_safetensors": True, "subfolder": f"text_encoder{ending}"}
        with failing_as(subject, "give the model that the results were trained on"):
            tokenizer = transformers.CLIPTokenizer.from_pretrained(name, subfolder=f"tokenizer{ending}", **options)
            text_encoder = kind.from_pretrained(name, **options, **more).float()
        tokenizer.model_max_length = text_encoder.config.max_position_embeddings  # which its configuration can lack
        for word, rows in words.items():
            add_word(tokenizer, text_encoder, word, list(rows.values())[i], subject)
        parts.append((tokenizer, text_encoder))
    return parts


@torch.no_grad()
def encode(parts, prompts, first=0):
    """Text features of prompts, from token `first` to PADDING after the end of each: (tokens of all, dim), float64.

    Token 0, the start, is the same in every prompt. So it counts where keys and values are to stay, and not where they
    are to change. SDXL's features are those of both encoders, side by side.
    """
    features = []
    for start in range(0, len(prompts), 50):
        hidden_states = []
        for tokenizer, text_encoder in parts:
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            ids = tokenizer(prompts[start : start + 50], **options).input_ids
            stops = (ids == tokenizer.eos_token_id).int().argmax(1) + 1 + PADDING
            # causal, so what follows does not matter
            output = text_encoder(ids[:, : max(stops)], output_hidden_states=True)
            hidden_states.append((output[0] if len(parts) == 1 else output.hidden_states[-2]).double())
        rows = torch.cat(hidden_states, -1)
        features += [rows[i, first:stop] for i, stop in enumerate(stops)]
    return torch.cat(features)


# ---------- Results ---------------------------------------------------------------------------------------------


def read_inputs(args):
    """Returns {result: (trained weights, its settings)}, {word: embeddings}, {word: (result, its name there)}."""
    renamed = {}
    for text in args.rename:
        match = re.fullmatch(r"(.+):([^:=]+)=([^:=]+)", text)
        if not match or match[1] not in args.results:
            fail(f"--rename {text!r}", "give RESULT:OLD=NEW, with one of the results")
        renamed[match[1], match[2]] = match[3]
    inputs, words, origin = {}, {}, {}
    for name in args.results:
        trained, own_words, sources = read_result(name)
        if any(".to_k." not in key and ".to_v." not in key for key in trained):
            fail(name, "trained with --freeze_model crossattn; queries and outputs see pictures and can't be merged so")
        with safe_open(sources[0], "pt") as content:
            settings = json.loads((content.metadata() or {}).get("settings", "{}"))
        inputs[name] = (trained, settings)
        for word, rows in own_words.items():
            trained_as, word = word, renamed.pop((name, word), word)
            if word in words:
                fail(name, f"has the word {word}, as {origin[word][0]} has; add --rename '{name}:{word}=<other>'")
            words[word], origin[word] = named(rows, word), (name, trained_as)
    for name, word in renamed:
        fail(f"--rename {name}:{word}", "no such word in this result")
    if not words:
        fail(args.results[0], "no word in it; give a result that was trained with --modifier_token")
    bases = {settings["base_model"] for _, settings in inputs.values() if "base_model" in settings}
    if len(bases) > 1:
        fail("results", "they were trained on different base models, as they record; give results of one")
    return inputs, words, origin


def find_phrases(args, inputs, words, origin):
    """Returns {word: (phrase with the word, the same without it)}, such as ("<new1> cat", "cat"), as it was trained."""
    phrases = {}
    for word in words:
        result, trained_as = origin[word]
        found = [phrase for phrase in args.concepts or () if word in phrase]
        for prompt, *_ in inputs[result][1].get("concepts", ()):
            if match := re.search(rf"(?<!\w){re.escape(trained_as)}(?!\w)", prompt):  # not my1 in my10
                found.append(prompt[match.start() :].replace(trained_as, word))
        if not found:
            fail(f"word {word}", f"{result} does not record its prompt; add --concepts '{word} cat', with its class")
        phrases[word] = (found[0], " ".join(found[0].replace(word, " ").split()))
    return phrases


def write_result(args, inputs, base, merged, words, phrases):
    """Writes weights and words as the trainer does, in both formats, so that everything takes the result."""
    settings = {"modifier_token": "+".join(words), "concepts": [[phrase] for phrase, _ in phrases.values()]}
    bases = [settings["base_model"] for _, settings in inputs.values() if "base_model" in settings]
    settings |= {"base_model": bases[0]} if bases else {}
    table = {}
    for key, change in merged.items():
        layer, _, rest = key.rpartition(".to_")  # "k.weight" or "v.weight"
        kind, _, part = rest.partition(".")
        table[f"{layer}.processor.to_{kind}_custom_diffusion.{part}"] = (base[key].double() + change).float()
        table[f"{layer.removesuffix('2')}1.processor"] = torch.empty(0)  # diffusers' loader wants all layers
    tables = {WEIGHTS_FILE: table} | {f"{word}.safetensors": rows for word, rows in words.items()}
    for name, content in tables.items():
        file, stream = Path(args.output_dir, name), io.BytesIO()
        write_file(file, serialize(content, {"settings": json.dumps(settings)}))
        torch.save({key: value if value.numel() else {} for key, value in content.items()}, stream)
        write_file(file.with_suffix(".bin"), stream.getvalue())


# ---------- The run ---------------------------------------------------------------------------------------------


def size(changes, matrix):
    """Square root of sum tr(D G D^T) over changes D: how far they move keys and values, whose mean f^T f is G."""
    return sum(float(((change @ matrix) * change).sum()) for change in changes.values()) ** 0.5


def merge(args):
    """Writes what `args` (from `parse_args`) describe, and says what of each concept is kept and what else moves."""
    inputs, words, origin = read_inputs(args)
    phrases = find_phrases(args, inputs, words, origin)
    subject = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    names = {key for trained, _ in inputs.values() for key in trained}
    base, unet, _ = read_base(args, subject, names)
    changes = {}
    for name, (trained, _) in inputs.items():
        own_words = {word: words[word] for word in words if origin[word][0] == name}
        change = subtract(trained, own_words, base, unet, subject)
        changes[name] = {key: value.double() for key, value in change.items()}

    with failing_as(f"--captions {args.captions}", "give a text file in UTF-8, one caption a line"):
        captions = [line for line in Path(args.captions).read_text("utf-8").splitlines() if line.strip()]
    encode_all = functools.partial(encode, load_text_parts(args, words, is_xl=bool(unet.get("addition_embed_type"))))
    templates = [opening + ending for opening in OPENINGS for ending in ENDINGS]
    concepts = [encode_all([text.format(phrase) for text in templates], first=1) for phrase, _ in phrases.values()]
    classes = [encode_all([text.format(phrase) for text in templates]) for _, phrase in phrases.values() if phrase]
    rest = encode_all(captions)
    if args.method == "paper":
        found = exact_filters(concepts, rest, args.ridge)
    else:
        found = filters(concepts, classes, rest, args.weight, args.class_weight, args.ridge)
    parts = [(changes[origin[word][0]], matrix) for word, matrix in zip(words, found, strict=True)]
    merged = {key: sum(change[key] @ matrix for change, matrix in parts) for key in base}

    for word, features, (trained, _) in zip(words, concepts, parts, strict=True):
        matrix = gram(features)
        lost = size({key: merged[key] - trained[key] for key in merged}, matrix) / (size(trained, matrix) or 1)
        print(f"{phrases[word][0]}: {100 * (1 - lost):.0f} % of what was trained is kept")
        if lost > 0.4:
            print(f"warning: {word} will be weaker; raise --weight, or train the concepts together", file=sys.stderr)
    matrix = gram(rest)
    own = size({key: base[key].double() for key in merged}, matrix)
    moved = [100 * size(change, matrix) / own for change in (*changes.values(), merged)]
    trained = ", ".join(f"{value:.2g} %" for value in moved[:-1])
    print(f"Keys and values of {len(captions)} other captions move by {moved[-1]:.2g} % (as trained: {trained})")
    write_result(args, inputs, base, merged, words, phrases)


def main(args):
    """Merges; what goes wrong in the machine, not in the program, ends with one line."""
    with failing_on_disk(args.output_dir):
        merge(args)
    print(f"Wrote {args.output_dir}; it loads like the result of a training")


if __name__ == "__main__":
    main(parse_args())
