#!/usr/bin/env python3
"""Join concepts that were trained apart, or keep one apart from the rest of the model, in closed form.

One result: the new word keeps what it has learned, and everything else changes back towards the base model:
    python scripts/merge.py results/cat --pretrained_model_name_or_path assets/model \\
        --output_dir results/cat-apart

Several results: their words work together in one model:
    python scripts/merge.py results/cat results/pot --pretrained_model_name_or_path assets/model \\
        --rename "results/pot:<new1>=<new2>" --output_dir results/merged

Takes minutes on a CPU, and needs neither a GPU nor pictures: keys and values of the cross-attention
see text features alone.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -m and -P leave it out

from results import (
    CHECKPOINT_FILE,
    PACKAGES_REMEDY,
    Parser,
    Result,
    add_word,
    base_digest,
    check_base,
    check_name,
    fail,
    failing_as,
    load_one_file,
    not_negative,
    one_line_errors,
    positive,
    read_base,
    read_result,
    start_command,
    subtract,
    warn,
    write_result,
)

# Tokens after the end that count. They see the whole prompt, but all 60 would outweigh its words.
PADDING = 10
CAPTIONS = Path(__file__).with_name("captions.txt")
TEMPLATES = Path(__file__).with_name("templates.txt")
# What the concepts count, and their plain classes. The second pair is for results of --keep_apart: their words have
# nearly the same features, and to give each exactly what was trained would change much.
WEIGHT, CLASS_WEIGHT = 10.0, 4.0
APART_WEIGHT, APART_CLASS_WEIGHT = 0.3, 16.0
# What a phrase does not end with: punctuation, and words that lead to what was cut off.
CONNECTING = "a|an|and|at|behind|beside|by|for|from|in|is|my|near|next|of|on|or|the|to|under|with"
DANGLING = re.compile(rf"(\s+({CONNECTING})|[\s,.;:])*$")


def parse_args(input_args=None):
    """Reads the command line, or the list of strings `input_args`, into a checked `argparse.Namespace`."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.usage = (
        "python scripts/merge.py RESULT [RESULT ...] --pretrained_model_name_or_path MODEL --output_dir FOLDER"
    )
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("results", type=path, nargs="+", metavar="RESULT", help="output_dir, checkpoint, or hub repository")
    parser.add_base_model()
    add("--tokenizer_name", type=path, help="tokenizer instead of the model's, if the training had one")
    add("--output_dir", type=path, required=True, help="folder for the new result")
    add("--rename", nargs="+", default=[], metavar="RESULT:OLD=NEW", help="other words, if two results share one")
    add("--weight", type=positive,
        help="of the concepts; higher keeps more of them and less of the rest "
        f"(default: {WEIGHT:g}, or {APART_WEIGHT:g} if all results are of --keep_apart)")
    add("--class_weight", type=not_negative,
        help="of the same prompts without the new word "
        f"(default: {CLASS_WEIGHT:g}, or {APART_CLASS_WEIGHT:g} if all results are of --keep_apart)")
    add("--captions", type=path, default=CAPTIONS, help="file of captions that are to stay as they are, one a line")
    add("--concepts", nargs="+", default=[], metavar="PHRASE",
        help='each word with its class, "<new1> cat", if it is to differ from the training')
    add("--ridge", type=not_negative, default=1e-2,
        help="keeps the weights small where no prompt says what they should be")
    add("--method", choices=("least_squares", "paper"), default="least_squares",
        help="paper: the concepts are kept exactly, whatever that costs the rest")
    # fmt: on
    return parser.parse_args(input_args)


# Wrong arguments are answered before the imports below, which take seconds.
arguments = start_command(parse_args) if __name__ == "__main__" else None

import torch

# ---------- The closed form -------------------------------------------------------------------------------------


def gram(features):
    """Mean of f^T f over the rows of features (n, dim): (dim, dim)."""
    return features.T @ features / len(features)


def filters(concepts, classes, captions, weight, class_weight, ridge):
    """Returns a matrix (dim, dim) for each concept, by which its trained changes are multiplied.

    `concepts` and `classes` are lists of text features (n, dim), of prompts with the new word and of
    the same prompts without it; `captions` (n, dim) are those of everything else. The new weights W
    of any key or value minimize

        ridge s |W - W0|^2 + mean |(W - W0) r|^2 + class_weight sum_i mean |(W - W0) c_i|^2
            + weight sum_i mean |(W - W_i) f_i|^2

    over the features r of captions, c_i of classes and f_i of concepts, where W0 are the base
    model's weights, W_i those trained for concept i, and s the mean square of a number in r. The
    minimum is W = W0 + sum_i (W_i - W0) M_i with M_i = weight G_i A^-1, where G_i is the mean of
    f_i^T f_i and A the sum of all four terms' means: the same matrices for every layer.
    """
    wanted = [weight * gram(features) for features in concepts]
    kept = gram(captions) + ridge * captions.square().mean() * torch.eye(captions.shape[1]).double()
    for features in classes:
        kept = kept + class_weight * gram(features)
    return solve(wanted, kept)


def exact_filters(concepts, captions, ridge):
    """The same by Kumari et al. (2023), their constrained optimization: W f = W_i f for all features of the concepts.

    Among such weights, those that move the captions' keys and values least: with the concepts'
    features in the rows of C, their keys or values as trained in the columns of V, and S the mean of
    r^T r over the captions, W = W0 + (V - W0 C^T) (d C^T)^-1 d with d = C S^-1. Nearly equal features
    contradict each other where concepts differ, so `ridge` softens the constraints: it is added to
    the diagonal of d C^T. As (d C^T + ridge)^-1 d = C (C^T C + ridge S)^-1, that is the form of
    `filters` with sums for the concepts' means, and with ridge S for what is kept.
    """
    wanted = [features.T @ features for features in concepts]
    # S has to have an inverse even where no caption has anything in some direction.
    unseen = 1e-6 * captions.square().mean() * torch.eye(captions.shape[1]).double()
    return solve(wanted, ridge * (gram(captions) + unseen))


def solve(wanted, kept):
    """Returns G_i A^-1 for every G_i in `wanted`, where A is the sum of these and `kept`."""
    total = kept + sum(wanted)
    if not total.isfinite().all():
        fail("--weight or --class_weight", "too large: the equations are not finite; lower it")
    values = torch.linalg.eigvalsh(total)  # in rising order
    if not values[0] > 1e-15 * values[-1]:
        fail("--ridge", "too small: the equations have no single solution; raise it")
    return [torch.linalg.solve(total, matrix).T for matrix in wanted]


# ---------- Text features ---------------------------------------------------------------------------------------


def load_text_parts(args, concepts, base):
    """Returns (tokenizer, text encoder) of the base model, or SDXL's two pairs, with the new words."""
    subject = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    endings = ("", "_2") if base.is_xl else ("",)
    parts = []
    for index, text_encoder in enumerate(load_text_encoders(args, base, subject)):
        tokenizer = load_tokenizer(args, base, endings[index])
        # A tokenizer's own configuration can lack its length.
        tokenizer.model_max_length = text_encoder.config.max_position_embeddings
        for concept in concepts:
            row = list(concept.rows.values())[index]
            add_word(tokenizer, text_encoder, concept.word, row, subject)
        parts.append((tokenizer, text_encoder))
    return parts


def load_text_encoders(args, base, subject):
    """Returns the base model's text encoder, or SDXL's two, in float32."""
    with failing_as("packages", PACKAGES_REMEDY):
        import transformers

        kinds = {"text_encoder": transformers.CLIPTextModel}
        if base.is_xl:
            kinds["text_encoder_2"] = transformers.CLIPTextModelWithProjection
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if base.file:
        pipeline = load_one_file(base, subject, unet=None, vae=None)
        return [getattr(pipeline, part) for part in kinds]
    model = args.pretrained_model_name_or_path
    options = {"revision": args.revision, "variant": args.variant, "use_safetensors": True}
    found = []
    for part, kind in kinds.items():
        remedy = "give the model that the results were trained on"
        with failing_as(f"{subject}: {part}", remedy, Path(model, part)):
            found.append(kind.from_pretrained(model, subfolder=part, **options).float())
    return found


def load_tokenizer(args, base, ending):
    """Loads the base model's tokenizer, or with the ending "_2" its second; --tokenizer_name replaces the first."""
    name = str(base.folder) if base.file else args.pretrained_model_name_or_path
    folder = f"tokenizer{ending}"
    flag = "config_name_or_path" if base.file else "pretrained_model_name_or_path"
    subject = f"--{flag} {name}: {folder}"
    options = {"subfolder": folder, "revision": args.revision}
    if args.tokenizer_name and not ending:
        name = args.tokenizer_name
        folder = ""
        subject = f"--tokenizer_name {name}"
        options = {}  # The revision is the model's.
        check_name(name, subject)
    with failing_as(subject, "give a complete tokenizer", Path(name, folder)):
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(name, **options)
        if tokenizer.unk_token in tokenizer.tokenize("a"):
            # transformers 5 makes such a tokenizer of missing files.
            raise ValueError("the vocabulary of its tokenizer is empty")
    return tokenizer


@torch.no_grad()
def encode(parts, prompts, clip_skip, first=0, word=None):
    """Text features of prompts, from token `first` to PADDING after the end of each, or of a word's token alone.

    Returns (tokens of all prompts, dim), float64. Token 0, the start, is the same in every prompt. So
    it counts where keys and values are to stay, and not where they are to change. SDXL's features are
    those of both encoders, side by side. `clip_skip` layers before the usual one are skipped.
    """
    features = []
    for begin in range(0, len(prompts), 50):
        batch = prompts[begin : begin + 50]
        hidden_states = []
        for tokenizer, text_encoder in parts:
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            ids = tokenizer(batch, **options).input_ids
            stops = (ids == tokenizer.eos_token_id).int().argmax(1) + 1 + PADDING
            # The encoder is causal, so what follows does not matter.
            output = text_encoder(ids[:, : max(stops)], output_hidden_states=True)
            if len(parts) > 1:
                found = output.hidden_states[-2 - clip_skip]
            elif clip_skip:
                text_model = getattr(text_encoder, "text_model", text_encoder)  # transformers 5.6 has no such part
                found = text_model.final_layer_norm(output.hidden_states[-1 - clip_skip])
            else:
                found = output[0]
            hidden_states.append(found.double())
        rows = torch.cat(hidden_states, -1)
        if word:
            features.append(rows[ids[:, : rows.shape[1]] == tokenizer.convert_tokens_to_ids(word)])
        else:
            features += [row[first:stop] for row, stop in zip(rows, stops, strict=True)]
    return torch.cat(features)


# ---------- Concepts and their phrases --------------------------------------------------------------------------


@dataclasses.dataclass
class Concept:
    """A word of a result, with its name in the new one and in the old one."""

    word: str
    trained_as: str
    result: Result
    rows: dict
    phrase: str = ""  # with the word, such as "<new1> cat"
    plain: str = ""  # the same without it, such as "cat"


def read_inputs(args):
    """Returns the results, which can be merged and are none of what --output_dir would replace."""
    if Path(args.output_dir).is_file():
        fail(f"--output_dir {args.output_dir}", "is a file; choose a folder")
    inputs = [read_result(name) for name in args.results]
    for result in inputs:
        if any(".to_k." not in name and ".to_v." not in name for name in result.weights):
            problem = "trained with --freeze_model crossattn; queries and outputs see pictures"
            fail(result.name, f"{problem} and can't be merged so")
        if not result.words:
            fail(result.name, "no word in it; give a result that was trained with --modifier_token")
        check_output(args.output_dir, result)
    return inputs


def check_output(output_dir, result):
    """Fails if the new result would replace an input, or another result of the same run."""
    replaced = [result.folder, *result.folder.glob("checkpoint-*")]
    if (result.folder / CHECKPOINT_FILE).is_file():
        replaced.append(result.folder.resolve().parent)
    output = Path(output_dir).resolve()
    if output.exists() and any(output.samefile(folder) for folder in replaced):
        problem = f"would replace {result.name} or a result of the same run; choose another folder"
        fail(f"--output_dir {output_dir}", problem)


def read_renames(args):
    """Returns {(result, its word): new name} of --rename."""
    # A path may be written in two ways: shells complete it with a slash at its end.
    results = {os.path.normpath(name): name for name in args.results}
    renames = {}
    for text in args.rename:
        match = re.fullmatch(r"(.+):([^:=]+)=([^:=+/\\\s]+)", text)
        path = os.path.normpath(os.path.expanduser(match[1])) if match else None
        if path not in results:
            problem = "give RESULT:OLD=NEW, with one of the results"
            fail(f"--rename {text!r}", f"{problem} and a word without spaces, '+' and slashes")
        renames[results[path], match[2]] = match[3]
    return renames


def read_concepts(args, inputs):
    """Returns a list of `Concept` with all words of the results, renamed and with their phrases."""
    renames = read_renames(args)
    concepts = []
    for result in inputs:
        for trained_as, rows in result.words.items():
            word = renames.pop((result.name, trained_as), trained_as)
            for other in concepts:
                if word == other.word:
                    remedy = f"add --rename '{result.name}:{word}=<other>'"
                    fail(result.name, f"has the word {word}, as {other.result.name} has; {remedy}")
            concepts.append(Concept(word, trained_as, result, rows))
    for name, word in renames:
        fail(f"--rename {name}:{word}", "no such word in this result")
    find_phrases(args.concepts, concepts)
    return concepts


def find_phrases(given, concepts):
    """Sets the concepts' phrases: those `given` with --concepts, or those of the training."""
    pattern = words_pattern(concept.word for concept in concepts)
    phrases = {}
    for text in given:
        rests = split_at_words(text, pattern)
        if not rests:
            words = ", ".join(concept.word for concept in concepts)
            fail(f"--concepts {text!r}", f"no word of the results in it; they have {words}")
        for word, rest in rests.items():
            if word in phrases:
                fail(f"--concepts {text!r}", f"{word} has a phrase already, {phrases[word]!r}; give one")
            phrases[word] = text if len(rests) == 1 else word + rest
    for concept in concepts:
        if concept.word not in phrases:
            rest = recorded_rest(concept.result, concept.trained_as)
            if rest is None:
                remedy = f"add --concepts '{concept.word} cat', with its class"
                fail(f"word {concept.word}", f"{concept.result.name} does not record its prompt; {remedy}")
            phrases[concept.word] = concept.word + rest
        concept.phrase = phrases[concept.word]
        concept.plain = " ".join(pattern.sub(" ", concept.phrase).split())


def words_pattern(words):
    """A pattern that finds words as the tokenizer does: anywhere in a text, the longest first."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def split_at_words(text, pattern):
    """Returns {word: what stands behind it in a text, before the next word}, such as {"<new1>": " cat"}."""
    matches = list(pattern.finditer(text))
    ends = [match.start() for match in matches] + [len(text)]
    rests = {}
    for match, end in zip(matches, ends[1:], strict=True):
        rest = text[match.end() : end]
        rests.setdefault(match[0], DANGLING.sub("", rest))
    return rests


def recorded_rest(result, word):
    """Returns what stood behind a word in the prompts of its training, None if that is not recorded.

    It is taken from the first instance prompt with the word. If the word stands in captions only,
    it is what all of these have behind it.
    """
    pattern = words_pattern(result.words)
    prompts = [concept[0] for concept in result.settings.get("concepts", [])]
    captions = result.settings.get("captions", [])
    for text in prompts:
        rests = split_at_words(text, pattern)
        if word in rests:
            return rests[word]
    found = [split_at_words(text, pattern) for text in captions]
    rests = [rests[word] for rests in found if word in rests]
    return common_beginning(rests) if rests else None


def common_beginning(texts):
    """The words with which all of some texts begin, as they are written in the first one."""
    words = [re.findall(r"\s*(?:\w+|[^\w\s])", text) for text in texts]
    common = os.path.commonprefix(words)
    return DANGLING.sub("", "".join(common))


def read_captions(file, concepts):
    """Returns the captions that are to stay as they are: the lines of a file in which no new word stands."""
    remedy = "give a text file in UTF-8, one caption a line"
    with failing_as(f"--captions {file}", remedy):
        lines = Path(file).read_text("utf-8-sig").splitlines()
    pattern = words_pattern(concept.word for concept in concepts)
    captions = [line for line in lines if line.strip() and not pattern.search(line)]
    if not captions:
        fail(f"--captions {file}", f"no caption in it without the new words; {remedy}")
    return captions


# ---------- The run ---------------------------------------------------------------------------------------------


def size(changes, matrix):
    """How far changes D move the keys and values of features whose mean f^T f is `matrix`, G.

    That is the square root of sum tr(D G D^T) over the layers.
    """
    return sum(float(((change @ matrix) * change).sum()) for change in changes.values()) ** 0.5


def warn_of_loss(inputs):
    """Warns of results from which merging takes more than it has to."""
    kinds = {"keep_apart": "--keep_apart", "with_prior_preservation": "class pictures"}
    for result in inputs:
        trained_with = [what for flag, what in kinds.items() if result.settings.get(flag)]
        if result.settings.get("kept_apart"):
            warn(f"{result.name}: was kept apart before; doing it again takes more of the concept away")
        elif len(inputs) == 1 and trained_with:
            problem = f"was trained with {trained_with[0]}; keeping it apart as well"
            warn(f"{result.name}: {problem} takes more of the concept away")


def find_clip_skip(inputs):
    """Returns how many layers of the text encoder the results skip, as they record; fails if they differ."""
    found = {result.settings.get("clip_skip") or 0 for result in inputs}
    if len(found) > 1:
        values = " and ".join(map(str, sorted(found)))
        fail("results", f"trained with --clip_skip {values}, as they record; give results of one")
    return found.pop()


def choose_weights(args, inputs):
    """Returns (weight, class weight): those given, or those that suit the results; mixed ones count as plain ones."""
    weight, class_weight = WEIGHT, CLASS_WEIGHT
    if all(result.settings.get("keep_apart") for result in inputs):
        weight, class_weight = APART_WEIGHT, APART_CLASS_WEIGHT
    if args.weight is not None:
        weight = args.weight
    if args.class_weight is not None:
        class_weight = args.class_weight
    return weight, class_weight


def subtract_base(args, inputs, subject):
    """Returns the base model, and the changes of its weights by each result.

    The changes are float64: {result: {name: change}}. Fails if the results record different models.
    """
    names = {name for result in inputs for name in result.weights}
    base = read_base(args, subject, names)
    changes = {}
    answers = []
    for result in inputs:
        change = subtract(result, base.weights, subject)
        changes[result.name] = {name: value.double() for name, value in change.items()}
        answers.append(check_base(result, base.weights, args.pretrained_model_name_or_path))
    keys = ("base_model_fp16", "base_model")
    recorded = {tuple(result.settings.get(key) for key in keys) for result in inputs}
    if len(recorded) > 1 and False in answers:
        fail("results", "trained on different base models, as they record; give results of one")
    return base, changes


def record(inputs, concepts, base, names):
    """The settings of the new result, under the trainer's names for them."""
    words = [concept.word for concept in concepts]
    settings = {"modifier_token": "+".join(words)}
    settings["concepts"] = [[concept.phrase] for concept in concepts]
    settings["base_model_fp16"] = base_digest(base, names)
    for flag in ("kept_apart", "with_prior_preservation"):
        settings[flag] = any(result.settings.get(flag, False) for result in inputs)
    # Of a mixed result, all features of a concept have to count when it is joined again.
    settings["keep_apart"] = all(result.settings.get("keep_apart", False) for result in inputs)
    for name in ("clip_skip", "prediction_type", "rescale_betas_zero_snr"):
        if name in inputs[0].settings:
            settings[name] = inputs[0].settings[name]
    if len(inputs) == 1:
        settings["kept_apart"] = True
    return settings


def merge(args):
    """Writes what `args` (from `parse_args`) describe, and prints what is kept and what else moves.

    Raises `results.Problem` or OSError.
    """
    inputs = read_inputs(args)
    concepts = read_concepts(args, inputs)
    captions = read_captions(args.captions, concepts)
    warn_of_loss(inputs)
    clip_skip = find_clip_skip(inputs)
    subject = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    base, changes = subtract_base(args, inputs, subject)

    # Text features
    parts = load_text_parts(args, concepts, base)
    templates = TEMPLATES.read_text("utf-8").splitlines()

    def features_of(phrase, **which):
        return encode(parts, [template.format(phrase) for template in templates], clip_skip, **which)

    wanted = []
    for concept in concepts:
        # --keep_apart trains by way of the word's own features.
        is_apart = concept.result.settings.get("keep_apart")
        which = {"word": concept.word} if is_apart else {"first": 1}
        wanted.append(features_of(concept.phrase, **which))
    classes = [features_of(concept.plain) for concept in concepts if concept.plain]
    rest = encode(parts, captions, clip_skip)

    # The closed form
    if args.method == "paper":
        found = exact_filters(wanted, rest, args.ridge)
    else:
        found = filters(wanted, classes, rest, *choose_weights(args, inputs), args.ridge)
    merged = {name: torch.zeros_like(value, dtype=torch.double) for name, value in base.weights.items()}
    for concept, matrix in zip(concepts, found, strict=True):
        for name, change in changes[concept.result.name].items():
            merged[name] += change @ matrix

    print_kept(concepts, wanted, changes, merged)
    print_moved(rest, len(captions), base.weights, changes, merged)
    weights = {name: (base.weights[name].double() + change).float() for name, change in merged.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        fail("--weight, --class_weight or --ridge", "the new weights are not finite; choose others")
    words = {concept.word: concept.rows for concept in concepts}
    write_result(args.output_dir, weights, words, record(inputs, concepts, base.weights, weights))


def print_kept(concepts, wanted, changes, merged):
    """Prints for each concept how much of its trained change of keys and values is there on its prompts."""
    for concept, features in zip(concepts, wanted, strict=True):
        matrix = gram(features)
        trained = changes[concept.result.name]
        missing = {name: merged[name] - trained[name] for name in merged}
        lost = size(missing, matrix) / (size(trained, matrix) or 1)
        print(f"{concept.phrase}: {100 * (1 - lost):.0f} % of what was trained is kept")
        if lost > 0.4:
            warn(f"{concept.word} will be weaker; raise --weight, or train the concepts together")


def print_moved(rest, count, base, changes, merged):
    """Prints how far the keys and values of other captions, with features `rest`, move."""
    matrix = gram(rest)
    own = size({name: value.double() for name, value in base.items()}, matrix)
    before = [100 * size(change, matrix) / own for change in changes.values()]
    after = 100 * size(merged, matrix) / own
    trained = ", ".join(f"{value:.2g} %" for value in before)
    print(f"Keys and values of {count} other captions move by {after:.2g} % (as trained: {trained})")


def main(args):
    """Merges; what goes wrong in the machine, not in the program, ends with one line."""
    with one_line_errors(args.output_dir):
        merge(args)
    print(f"Wrote {args.output_dir}; it loads like the result of a training")


if __name__ == "__main__":
    main(arguments)
