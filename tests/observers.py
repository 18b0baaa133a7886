"""Observers: functions that a process calls before the trainer's main, to watch the libraries at work or disturb them.

Each takes output_dir and the process's rank, and may return a function to call after main. It leaves its notes beside
output_dir. As a script this module starts main under an observer:

    python observers.py OBSERVER OUTPUT_DIR [flags of the trainer]
"""

import collections
import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

WEIGHTS = "pytorch_custom_diffusion_weights"


def beside(folder, name):
    """A file beside output_dir in which an observer leaves its notes."""
    return folder.with_name(f"{folder.name}.{name}")


# Watching


def without_check_of_prediction():
    """Leaves out what encodes, adds noise and predicts before the first step."""
    import train_custom_diffusion as trainer

    trainer.check_prediction = lambda *_: None


def record_generation(folder, rank):
    """Notes the prompt and the seed of each picture that a pipeline draws from a list of generators."""
    call = StableDiffusionPipeline.__call__

    def recorded(self, prompt, *args, generator, **kwargs):
        if isinstance(generator, list):
            with open(beside(folder, f"drawn{rank}"), "a") as file:
                file.writelines(f"{p} {g.initial_seed()}\n" for p, g in zip(prompt, generator, strict=True))
        return call(self, prompt, *args, generator=generator, **kwargs)

    StableDiffusionPipeline.__call__ = recorded


def record_steps(folder, rank):
    """Records latents, noise, timesteps and token ids of every step, and the models as they are in the end."""
    without_check_of_prediction()
    record, models = {"noised": [], "ids": []}, {}
    add_noise, forward = DDPMScheduler.add_noise, CLIPTextModel.forward

    def recorded_add_noise(self, latents, noise, timesteps):
        record["noised"].append([latents.clone(), noise.clone(), timesteps.clone()])
        return add_noise(self, latents, noise, timesteps)

    def recorded_forward(self, input_ids=None, *args, **kwargs):
        if torch.is_grad_enabled():
            record["ids"].append(input_ids.clone())
        return forward(self, input_ids, *args, **kwargs)

    def keep(cls):
        load = cls.from_pretrained

        def loader(*args, **kwargs):
            loaded = load(*args, **kwargs)
            models.setdefault(cls.__name__, loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        cls.from_pretrained = loader

    def save():
        record["models"] = {name: dict(model.state_dict()) for name, model in models.items()}
        torch.save(record, beside(folder, "steps"))

    DDPMScheduler.add_noise, CLIPTextModel.forward = recorded_add_noise, recorded_forward
    keep(UNet2DConditionModel), keep(CLIPTextModel), keep(AutoencoderKL)
    return save


def batch_of(arguments):
    """The batch among the arguments of a function of the trainer."""
    return next(value for value in arguments if isinstance(value, dict))


def record_losses(folder, rank):
    """Records each batch and its loss."""
    import train_custom_diffusion as trainer

    loss_of, steps = trainer.diffusion_loss, []

    def recorded(*args, **kwargs):
        loss = loss_of(*args, **kwargs)
        steps.append(batch_of((*args, *kwargs.values())) | {"loss": loss.detach().clone()})
        return loss

    trainer.diffusion_loss = recorded
    return lambda: torch.save(steps, beside(folder, "losses"))


def record_tables(folder, rank):
    """Records the text encoders' frozen tables of embeddings as they are when the result is saved."""
    import train_custom_diffusion as trainer

    save = trainer.Result.save

    def recorded(result, pipeline, *where):
        tables = [encoder.get_input_embeddings().table.weight for _, encoder in trainer.text_parts(pipeline)]
        torch.save(tables, beside(folder, "tables"))
        return save(result, pipeline, *where)

    trainer.Result.save = recorded


def record_losses_and_draw_fast(folder, rank):
    """Records batches and losses; a picture takes 4 steps of the sampler, as drawing takes longest in tiny models."""
    call = StableDiffusionPipeline.__call__

    def draw(self, *args, num_inference_steps, **kwargs):
        return call(self, *args, num_inference_steps=4, **kwargs)

    StableDiffusionPipeline.__call__ = draw
    return record_losses(folder, rank)


def record_batches(folder, rank):
    """Records the pixels that are encoded before the training, every batch of the training, and its latents."""
    import train_custom_diffusion as trainer

    without_check_of_prediction()
    record = {"pixels": [], "batches": [], "latents": [], "encoded_in_training": 0}
    encode, add_noise, loss_of = AutoencoderKL.encode, DDPMScheduler.add_noise, trainer.diffusion_loss

    def recorded_encode(self, pixels, *args, **kwargs):
        record["encoded_in_training"] += bool(record["batches"])
        record["pixels"].append(pixels.clone())
        return encode(self, pixels, *args, **kwargs)

    def recorded_add_noise(self, latents, *args):
        record["latents"].append(latents.clone())
        return add_noise(self, latents, *args)

    def recorded_loss(*args, **kwargs):
        batch = batch_of((*args, *kwargs.values()))
        record["batches"].append({key: value.clone() for key, value in batch.items()})
        return loss_of(*args, **kwargs)

    AutoencoderKL.encode, DDPMScheduler.add_noise = recorded_encode, recorded_add_noise
    trainer.diffusion_loss = recorded_loss
    return lambda: torch.save(record, beside(folder, f"batches{rank}"))


class WaitingOperations(TorchDispatchMode):
    """Lists the operations that make the host wait for a device."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def watch_steps(folder, rank):
    """Counts, in the steps, what makes the host wait, forward passes of layers, and predictions in channels_last."""
    import diffusers.models.attention
    import transformers.models.clip.modeling_clip
    from accelerate import Accelerator

    found, under_way = {"waits": [], "FeedForward": 0, "CLIPMLP": 0, "channels_last": 0}, []

    def count(cls):
        forward = cls.forward

        def counted(self, *args, **kwargs):
            found[cls.__name__] += len(under_way)
            return forward(self, *args, **kwargs)

        cls.forward = counted

    count(diffusers.models.attention.FeedForward)
    count(transformers.models.clip.modeling_clip.CLIPMLP)
    accumulate, forward = Accelerator.accumulate, UNet2DConditionModel.forward

    def predict(*args, **kwargs):
        output = forward(*args, **kwargs)
        found["channels_last"] += len(under_way) * (not output.sample.is_contiguous())
        return output

    UNet2DConditionModel.forward = predict

    @contextlib.contextmanager
    def watched(*args, **kwargs):
        under_way.append("step")
        with WaitingOperations(found["waits"]), accumulate(*args, **kwargs):
            yield
        under_way.pop()

    Accelerator.accumulate = watched
    return lambda: beside(folder, "json").write_text(json.dumps(found))


def record_files_and_weights(folder, rank):
    """Notes what the process creates, writes, renames or deletes beside output_dir, and records the final weights."""
    from accelerate import Accelerator

    watched = str(folder.parent)
    notes = open(beside(folder, f"files{rank}"), "w", buffering=1)  # noqa: SIM115 (open until the process ends)

    def watch(event, details):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        changes |= event == "open" and bool(details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and isinstance(details[0], str) and os.path.abspath(details[0]).startswith(watched):
            notes.write(f"{event} {details[0]}\n")

    prepare, log, models = Accelerator.prepare, Accelerator.log, []

    def recorded(self, *objects, **options):
        models.extend(one for one in objects if isinstance(one, torch.nn.Module))
        return prepare(self, *objects, **options)

    def save(self, *values, **options):
        (model,) = models
        weights = {name: p.detach() for name, p in model.named_parameters()}
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        torch.save([weights, trained], f"{notes.name}.pt")
        return log(self, *values, **options)

    Accelerator.prepare, Accelerator.log = recorded, save
    sys.addaudithook(watch)


class OperationNames(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def watch_final_pictures(folder, rank):
    """Counts the operations that draw the final pictures, by name."""
    import train_custom_diffusion as trainer

    validate, found = trainer.validate, collections.Counter()

    def watched(args, accelerator, pipeline, step):
        with OperationNames(found) if (folder / f"{WEIGHTS}.bin").exists() else contextlib.nullcontext():
            return validate(args, accelerator, pipeline, step)

    trainer.validate = watched
    return lambda: beside(folder, "json").write_text(json.dumps(found))


def watch_precision(folder, rank):
    """Notes for each call of the UNet whether it proves the reload, and whether TF32 is allowed."""
    import train_custom_diffusion as trainer

    without_check_of_prediction()
    forward, prove, found, proving = UNet2DConditionModel.forward, trainer.prove_reload, [], []

    def watched(self, *args, **kwargs):
        found.append([bool(proving), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32])
        return forward(self, *args, **kwargs)

    def proved(*args):
        proving.append(args)
        prove(*args)
        proving.pop()

    UNet2DConditionModel.forward, trainer.prove_reload = watched, proved
    return lambda: beside(folder, "json").write_text(json.dumps(found))


# Disturbing


def spawn_workers(folder, rank):
    """Starts the data loader's workers as macOS and Windows do."""
    multiprocessing.set_start_method("spawn", force=True)


def no_memory_for_final_pictures(folder, rank):
    """Raises the error of a full GPU when the final pictures are drawn."""
    import train_custom_diffusion as trainer

    validate = trainer.validate

    def fail(args, accelerator, pipeline, step):
        if (folder / f"{WEIGHTS}.bin").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")
        return validate(args, accelerator, pipeline, step)

    trainer.validate = fail


def predict_velocity(folder, rank):
    """Turns what an epsilon model of the usual schedule predicts into the velocity of the same picture."""
    forward = UNet2DConditionModel.forward
    noise_share = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod

    def converted(self, noisy, timesteps, *args, **kwargs):
        output = forward(self, noisy, timesteps, *args, **kwargs)
        alpha = noise_share[timesteps.long().cpu()].reshape(-1, 1, 1, 1)
        output.sample = (output.sample - (1 - alpha).sqrt() * noisy) / alpha.sqrt()
        return output

    UNet2DConditionModel.forward = converted


def old_diffusers(folder, rank):
    """A pair of versions of which the older one can't read what the newer one makes."""
    import diffusers
    import transformers

    diffusers.__version__, transformers.__version__ = "0.38.0", "5.6.0"


def random_text_encoder(folder, rank):
    """diffusers reads a text encoder from a file, and leaves a layer of it as it was drawn."""
    load = StableDiffusionPipeline.from_single_file

    def loaded(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        names = [name for name, _ in pipeline.text_encoder.named_parameters() if name.endswith("fc2.weight")]
        torch.nn.init.normal_(pipeline.text_encoder.get_parameter(names[-1]))
        return pipeline

    StableDiffusionPipeline.from_single_file = loaded


def no_memory_for_pictures(folder, rank):
    """Raises the error of a full GPU when the first two validations draw, after the first network has run.

    Records where the VAE is put before this error ends the drawing.
    """
    import train_custom_diffusion as trainer

    decode, validate, to = trainer.decode, trainer.validate, AutoencoderKL.to
    calls, places = [], []

    def fail(*args):
        calls.append(args)
        places.clear()
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")
        return decode(*args)

    def put(vae, *args, **options):
        places.append(str(args[0]))
        return to(vae, *args, **options)

    def watched(*args):
        try:
            return validate(*args)
        except torch.OutOfMemoryError:
            beside(folder, "json").write_text(json.dumps(places))
            raise

    trainer.decode, trainer.validate, AutoencoderKL.to = fail, watched, put


def slow_disk(folder, rank):
    """Makes flushing and deleting a file take long enough for a test to kill the process in between."""
    fsync, unlink = os.fsync, os.unlink

    def slow_fsync(descriptor):
        time.sleep(0.03)
        fsync(descriptor)

    def slow_unlink(*file, **options):
        time.sleep(0.03)
        unlink(*file, **options)

    os.fsync, os.unlink = slow_fsync, slow_unlink


def die_while_a_checkpoint_is_deleted(folder, rank):
    """Ends the process instead of deleting a checkpoint's largest file."""
    unlink = os.unlink

    def die(file, **options):
        if Path(os.fsdecode(file)).name == "training_state.pt":
            os._exit(9)
        unlink(file, **options)

    os.unlink = die


def die_while_a_picture_is_written(folder, rank):
    """Ends the process in the middle of the second picture that it writes."""
    save, saved = Image.Image.save, []

    def save_half(image, target, *args, **options):
        saved.append(target)
        if len(saved) < 2:
            return save(image, target, *args, **options)
        content = io.BytesIO()
        save(image, content, "PNG")
        half = content.getvalue()[:1000]
        if hasattr(target, "write"):
            target.write(half)
            target.flush()
        else:
            Path(target).write_bytes(half)
        os._exit(9)

    Image.Image.save = save_half


def run_out_of_memory(folder, rank):
    """Raises the error of a full GPU in the second step of the second process."""
    without_check_of_prediction()
    add_noise, steps = DDPMScheduler.add_noise, []

    def fail(*args):
        steps.append(args)
        if rank == 1 and len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")
        return add_noise(*args)

    DDPMScheduler.add_noise = fail


def too_large_for_the_machine(folder, rank):
    """The second step asks for more memory than any computer has."""
    without_check_of_prediction()
    add_noise, steps = DDPMScheduler.add_noise, []

    def ask(*args):
        steps.append(args)
        if len(steps) == 2:
            torch.empty(2**50)
        return add_noise(*args)

    DDPMScheduler.add_noise = ask


def somebody_reads_a_file(folder, rank):
    """Removing a folder raises what NFS does while somebody reads a file that was in it."""
    rmdir = os.rmdir

    def refuse(path, **options):
        if Path(path).name.startswith(("checkpoint-", ".unfinished-")):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, **options)

    os.rmdir = refuse


def no_folder_can_be_renamed(folder, rank):
    """Renaming a folder raises what a bucket that is mounted as a disk does."""

    def guard(name):
        rename = getattr(os, name)

        def refuse(source, target, **options):
            if Path(source).is_dir():
                raise OSError(errno.ENOTSUP, "Operation not supported", str(source))
            return rename(source, target, **options)

        setattr(os, name, refuse)

    guard("rename")
    guard("replace")


def nothing_can_be_renamed(folder, rank):
    """The same for files, as in Amazon's mounted buckets."""

    def refuse(source, target, **options):
        raise OSError(errno.EPERM, "Operation not permitted", str(source))

    os.rename = os.replace = refuse


def disk_of_windows(folder, rank):
    """The disk refuses the signs in names that Windows refuses."""

    def refuse(event, details):
        place, _, name = str(details[0]).rpartition("/") if event == "open" else ("", "", "")
        if place.startswith(str(folder.parent)) and set(name) & set('<>:"|?*'):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), details[0])

    sys.addaudithook(refuse)


def no_locks(folder, rank):
    """Locking a file raises the error of a network drive without locks."""

    def refuse(stream, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = refuse


def gpu_of_another_torch(folder, rank):
    """A GPU's first operation raises what torch does where it has no code for it."""

    def refuse(*args, **options):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ..."
        )

    torch.ones = refuse


def fewer_gpus_than_processes(folder, rank):
    """Choosing the process's GPU raises what torch does where there is none."""
    prepare = accelerate.PartialState._prepare_backend

    def refuse(*args, **options):
        prepare(*args, **options)
        raise RuntimeError(
            "CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?"
        )

    accelerate.PartialState._prepare_backend = refuse


def few_open_files(folder, rank):
    """Allows the process to open few files more, as macOS does; a picture takes one step of the sampler."""
    call = StableDiffusionPipeline.__call__

    def draw(self, *args, num_inference_steps, **kwargs):
        return call(self, *args, num_inference_steps=1, **kwargs)

    StableDiffusionPipeline.__call__ = draw
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def no_memory_for_the_proof(folder, rank):
    """Raises the error of a full GPU when diffusers loads the result."""

    def fail(file, unet, options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB")

    before_loading(fail)(folder, rank)


def take_long_in_a_step(folder, rank):
    """Makes the third step take 12 seconds."""
    without_check_of_prediction()
    add_noise, steps = DDPMScheduler.add_noise, []

    def slow(*args):
        steps.append(args)
        if len(steps) == 3:
            beside(folder, "long").touch()
            time.sleep(12)
        return add_noise(*args)

    DDPMScheduler.add_noise = slow


def kill_a_worker(folder, rank):
    """What the system does to a data-loader worker when memory is short."""
    stack = np.stack

    def killed(arrays):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return stack(arrays)

    np.stack = killed


def hang_in_a_step(folder, rank):
    """Makes the first step take a minute."""
    without_check_of_prediction()
    DDPMScheduler.add_noise = lambda *args: time.sleep(60)


def compile_wrongly(folder, rank):
    """Compiles the model, as `accelerate launch --dynamo_backend` makes it, whose gradients are then zero."""
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "EAGER"
    forward = UNet2DConditionModel.forward

    def wrong(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            output.sample = 0 * output.sample + output.sample.detach()
        return output

    UNet2DConditionModel.forward = wrong


def before_loading(change):
    """An observer that calls change(file, unet, options) when diffusers is about to load the result's attention."""

    def observer(folder, rank):
        load, file = UNet2DConditionModel.load_attn_procs, folder / f"{WEIGHTS}.safetensors"

        def disturbed(unet, *args, **options):
            if file.exists():  # otherwise it is the trial before the training
                change(file, unet, options)
            return load(unet, *args, **options)

        UNet2DConditionModel.load_attn_procs = disturbed

    return observer


def truncate_weights(folder, rank):
    """The weights that diffusers is about to load lose their end."""
    before_loading(lambda file, unet, options: file.write_bytes(file.read_bytes()[:-1000]))(folder, rank)


def change_a_number(folder, rank):
    """One number of the weights that diffusers is about to load changes."""

    def change(file, unet, options):
        state = load_file(file)
        max(state.values(), key=len)[0, 0] += 1e-3
        save_file(state, file)

    before_loading(change)(folder, rank)


def drop_a_layer(folder, rank):
    """The weights that diffusers is about to load lack a layer."""

    def change(file, unet, options):
        state = load_file(file)
        layer = max(state, key=lambda key: len(state[key])).partition(".processor")[0]
        save_file({key: value for key, value in state.items() if not key.startswith(layer)}, file)

    before_loading(change)(folder, rank)


def load_nothing(folder, rank):
    """diffusers' loader is called in the way in which it installs nothing."""
    before_loading(lambda file, unet, options: options.pop("_pipeline"))(folder, rank)


def load_nothing_in_the_trial(folder, rank):
    """diffusers' loader installs nothing, as if a later version no longer knew such weights."""
    UNet2DConditionModel.load_attn_procs = lambda unet, *args, **options: None


def change_the_unet(folder, rank):
    """The loader changes the UNet elsewhere, too."""
    before_loading(lambda file, unet, options: unet.conv_in.weight.data.add_(0.1))(folder, rank)


def find_another_word(folder, rank):
    """The loader of embeddings makes the tokenizer find another word, too."""
    load = diffusers.StableDiffusionPipeline.load_textual_inversion

    def find(pipeline, *args, **options):
        load(pipeline, *args, **options)
        pipeline.tokenizer.add_tokens("photo")

    diffusers.StableDiffusionPipeline.load_textual_inversion = find


def load_no_embedding(folder, rank):
    """The loader of embeddings adds the word, but not its embedding."""

    def skip(pipeline, *args, **options):
        pipeline.tokenizer.add_tokens("<new1>")
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))

    diffusers.StableDiffusionPipeline.load_textual_inversion = skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from train_custom_diffusion import main, parse_args

    observer, output_dir, *words = sys.argv[1:]
    finish_observing = globals()[observer](Path(output_dir), int(os.environ.get("RANK", 0)))
    main(parse_args(words))
    if finish_observing:
        finish_observing()
