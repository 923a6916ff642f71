"""A training run, from top to bottom: folder, corpus, model, engine, steps, and how it ends."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.config.load import to_tree
from nsa_train.data.loader import NO_LABEL, Batch, Loader
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import Stage, micro_batches_of, stages_of
from nsa_train.data.store import TokenStore
from nsa_train.errors import DivergedError, Interrupted
from nsa_train.model.counts import count_parameters
from nsa_train.model.transformer import Transformer
from nsa_train.parallel.engine import (
    Engine,
    engine_settings,
    on_rank_zero,
    start_processes,
    stop_processes,
    sum_over_ranks,
)
from nsa_train.parallel.materialise import materialise
from nsa_train.parallel.probe import probe_engine
from nsa_train.plan.check import PlanCheck, check_memory
from nsa_train.train import checkpoint
from nsa_train.train.evaluate import evaluate, means
from nsa_train.train.export import export_model
from nsa_train.train.failures import FIRST_FAILURE, ending_of, failure_of
from nsa_train.train.folder import RunFolder
from nsa_train.train.graphs import against_replays, replay_passes
from nsa_train.train.guards import BadSteps, Spikes, StopSignals
from nsa_train.train.heldout import HELDOUT, document_losses
from nsa_train.train.initial import common_hash, locate, origin_of, start_weights
from nsa_train.train.metrics import Clock, Metrics, plot_losses
from nsa_train.train.optim import build_optimizer, lr_at
from nsa_train.train.profile import StepProfiler
from nsa_train.train.watchdog import START, Watchdog, start_limit_s


def train(config: schema.Config, signals: StopSignals) -> int:
    """Train, or go on, or say that the run is finished; the exit code. Called on every rank."""
    runtime.launch_alone()
    device = runtime.device()
    start_processes(device, config.parallel.timeout_s)
    folder = RunFolder(config)
    agreed = False  # that the run ends, by all ranks: only then can they leave the group together
    try:
        on_rank_zero(folder.claim)
        if finished := on_rank_zero(lambda: _finished(folder)):
            runtime.log.info("%s", finished)
        else:
            _run(config, folder, device, signals)
        agreed = True
    except Interrupted as stop:
        agreed = stop.__cause__ is None
        raise
    finally:
        folder.release()
        if agreed:
            stop_processes()
    return 0


def _run(config: schema.Config, folder: RunFolder, device: torch.device, signals: StopSignals) -> None:
    limit_s = start_limit_s(config.parallel.hang_s, config.parallel.timeout_s)
    try:
        on_rank_zero(lambda: check_memory(config, runtime.world_size(), runtime.device_name()))
        corpus = Path(on_rank_zero(lambda: str(prepare(config.data, config.model.vocab, runtime.log.info))))
        with Watchdog(folder.path, limit_s, runtime.rank(), FIRST_FAILURE, START) as watchdog:
            run = _Run(config, folder, corpus, device, signals, watchdog)
            run.resume()
    except BaseException as error:
        failure = failure_of(error, folder.path)
        before = {"steps": 0, **folder.read_json("summary.json")}  # what an earlier launch reached holds
        on_main(lambda: folder.write("summary.json", before | ending_of(failure)))
        raise failure from failure.__cause__
    run.go()


def _finished(folder: RunFolder) -> str | None:
    summary = folder.read_json("summary.json")
    if summary.get("status") != "done":
        return None
    return (
        f"{folder.path} is finished: {summary.get('steps')} steps, held-out loss "
        f"{_nats(summary.get('val_loss_first'))} -> {_nats(summary.get('val_loss_last'))}. To train again choose "
        "another name=, or delete the folder."
    )


@dataclass
class Progress:
    """What a run knows of itself beside weights and random states; saved with each checkpoint."""

    initial_weights: dict[str, str]  # sha256 by name and shape of what it started with
    origin: dict[str, Any] | None = None  # of weights that another run trained: `initial.origin_of`
    step: int = 0  # finished steps
    skipped: int = 0  # of them, non-finite and not taken
    val_loss_first: float | None = None
    val_loss_last: float | None = None
    wall_s: float = 0.0  # of training so far, earlier launches included
    last_speed: float | None = None  # tokens per second


class _Run:
    def __init__(
        self, config: schema.Config, folder: RunFolder, corpus: Path, device: torch.device, signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.corpus, self.device, self.signals = config, folder, corpus, device, signals
        self.watchdog = watchdog
        self.world, self.stages = runtime.world_size(), stages_of(config)
        runtime.seed_everything(config.seed)
        stores = {split: TokenStore.open(self.corpus, split) for split in ("train", "heldout")}
        self.facts = stores["train"].manifest
        self.loaders = {split: Loader(store, self.stages, config.data, config.seed) for split, store in stores.items()}
        self.watchdog.beat()
        self._build()
        self.metrics: Metrics | None = None
        self.wandb_id: str | None = None
        self.clock, self.started, self.earlier = Clock(), time.perf_counter(), 0.0
        self.bad_steps, self.spikes = BadSteps(config.trainer.max_bad_steps), Spikes(config.trainer, device)
        self.load = torch.zeros(len(self.model.routers()), config.moe.experts, device=device)  # since the last log step

    def _build(self) -> None:
        """Model with keyed initial values, or zeros until `resume` fills it, optimizer, engine."""
        config, trainer = self.config, self.config.trainer
        dtype = runtime.dtype_of(trainer.dtype)
        with torch.device("meta"):
            self.model = Transformer(config.model, config.attention, config.moe)
        self.model.recompute_activations(trainer.computed_again)
        if trainer.compile:
            self.model.compile_attention()
        if trainer.force_balance:
            runtime.log.warning("trainer.force_balance: routing is not learned; for measurements of speed only")
            self.model.force_balance()
        self.parameters = count_parameters(self.model)
        sections = {name: to_tree(config)[name] for name in ("model", "attention", "moe", "optim")}
        self.identity = checkpoint.identity_of(self.model, sections)
        self.checkpoints = self.folder.path / "checkpoints"
        self.found = on_rank_zero(lambda: checkpoint.find_newest_good(self.checkpoints, self.identity))
        self.watchdog.beat()
        place = None
        if config.init_from and not self.found:
            place = on_rank_zero(lambda: locate(Path(str(config.init_from))))
        self.micro_batches = micro_batches_of(self.stages, trainer, self.world)
        micro_rows = self.stages[0].batch_rows // (self.world * self.micro_batches)
        self.settings = engine_settings(
            config.parallel, dtype, config.optim.clip, micro_rows, self.micro_batches, self.world
        )
        probe_engine(self.settings, dtype, self.device)
        self.taken: list[str] = []
        if self.found:
            materialise(self.model, {}, dtype, self.settings)
        else:
            if config.model.head_prior and not place:  # weights of another run come with the prior that they had
                counts = self.loaders["train"].label_counts(trainer.steps, config.model.vocab)
                self.model.head.set_prior(torch.from_numpy(counts))
            hashes, self.taken = start_weights(self.model, config.seed, place, dtype, self.settings)
            self.progress = Progress(initial_weights=hashes, origin=origin_of(place) if place else None)
        self.watchdog.beat()
        self.engine = Engine(self.model, build_optimizer(self.model, config.optim), self.settings)

    # The run ----------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one, and open the metrics."""
        self.watchdog.beat()
        if self.found:
            state = self.found.manifest["state"]
            checkpoint.restore(self.found, self.engine)
            self.watchdog.beat()
            self.loaders["train"].check_state(state["loader"], self.config.trainer.steps)
            self.progress = Progress(**state["progress"])
            self.spikes.load_state(state["spikes"])
            self.bad_steps.in_a_row = state.get("bad_steps_in_a_row", 0)  # not in checkpoints of older versions
            if "load" in state:  # nor this
                self.load += torch.tensor(state["load"], device=self.device).reshape(self.load.shape)
            self.wandb_id = state.get("wandb_id")
        self.metrics = on_main(self._open_metrics)
        self.earlier = self.progress.wall_s
        self._announce()

    def go(self) -> None:
        """Train, and leave a summary however it ends."""
        self.signals.training = True
        with Watchdog(self.folder.path, self.config.parallel.hang_s, runtime.rank(), FIRST_FAILURE) as self.watchdog:
            try:
                self._train()
            except BaseException as error:
                failure = failure_of(error, self.folder.path)
                on_main(lambda: self._summarise(**ending_of(failure)))
                raise failure from failure.__cause__
        on_main(lambda: self._summarise("done", 0))

    def _train(self) -> None:
        profiler = on_main(self._profiler)
        try:
            for row in self._steps(profiler):
                self._after_step(row)
        finally:
            if profiler:
                profiler.stop()
        self._enter(self.config.trainer.steps - 1)
        self._measure_documents()
        self.watchdog.beat()
        if self.config.trainer.export:
            weights, target = self.engine.whole_weights(), self.folder.path / "export"
            self.watchdog.beat()
            tokenizer, beat = self.corpus / self.facts["tokenizer"], self.watchdog.beat
            on_main(lambda: export_model(weights, self.model.rope_factor, self.config, tokenizer, target, beat))

    def _steps(self, profiler: StepProfiler | None) -> Iterator[dict[str, Any]]:
        """Take the remaining steps; yields each step's figures, equal on all ranks but for `seconds`."""
        trainer = self.config.trainer
        self.plan_check = on_main(self._plan_check)
        if self.progress.step == 0:
            self._validate()
        self.clock.reset()
        first = self.progress.step
        for step in range(first, trainer.steps):
            if self.config.in_graphs and step == first + self.config.profile.until_written:
                said = replay_passes(self.model, self.device)
                if self.metrics:
                    self.metrics.say(said)
            began = time.perf_counter()
            lr, waited = lr_at(step, trainer.steps, self.config.optim.lr, self.config.schedule), self.clock.waited
            self.engine.set_lr(lr)
            stage = self._enter(step)
            if step == stage.first_step:
                self.spikes.forget()
            labels = self.loaders["train"].label_tokens(step)
            tokens = trainer.batch_rows * trainer.seq_len
            loss = torch.zeros((), device=self.device)
            load = torch.zeros(len(self.model.routers()), self.config.moe.experts, device=self.device)
            by_source = torch.zeros(len(self.facts["sources"]) + 1, 2, dtype=torch.float64, device=self.device)
            micro_rows = stage.batch_rows // (self.world * self.micro_batches)
            batches = self._timed(self.loaders["train"].micro_batches(step, runtime.rank(), self.world, micro_rows))
            for number, batch in enumerate(batches, start=1):
                out = self.engine(batch.tokens, batch.labels, batch.packing, trainer.loss_chunk_tokens)
                cross_entropy = out.token_losses.sum() / labels
                share = cross_entropy + self.config.moe.aux_weight * out.balance / tokens
                loss += cross_entropy.detach()
                if number == self.micro_batches:  # the step's loss is known before the step is taken
                    sum_over_ranks(loss)
                    spike = self.spikes.is_spike(loss)
                    if trainer.on_spike != "warn":
                        share = share * torch.where(spike, torch.nan, 1.0)  # DeepSpeed skips it: no sync for that
                self.engine.backward(share)
                load += out.load
                pairs = torch.stack([out.token_losses.detach(), batch.labels != NO_LABEL], dim=1).double()
                by_source.index_add_(0, batch.sources % len(by_source), pairs)  # NO_SOURCE, -1, is the last
            stop = torch.tensor(float(self.signals.received is not None), device=self.device)
            sum_over_ranks(load, stop)
            mean_loss, must_stop, spiked = torch.stack(
                [loss, stop, spike.float()]
            ).tolist()  # sync: the only one of ours
            bad = self.engine.skipped
            if not bad:
                self.model.balance_experts(load)
                self.spikes.note(loss)
            self.progress.step = step + 1
            if profiler and self.metrics and (table := profiler.step(self.clock.waited - waited)):
                self.metrics.say(table)
            yield {
                "step": step + 1, "tokens": (step + 1) * tokens, "loss": None if bad and not spiked else mean_loss,
                "lr": lr, "grad_norm": None if bad else self.engine.gradient_norm, "skipped": bad,
                "spike": spiked > 0, "stop": must_stop > 0, "load": load, "by_source": by_source[:-1],
                "seconds": time.perf_counter() - began,
            }  # fmt: skip

    def _after_step(self, row: dict[str, Any]) -> None:
        """Log, validate, checkpoint, and stop if all ranks agreed to."""
        trainer, step = self.config.trainer, row["step"]
        stop, load, seconds, bad = row.pop("stop"), row.pop("load"), row.pop("seconds"), row["skipped"]
        self.clock.steps += 1
        self.load += load
        last = step == trainer.steps
        if step % trainer.log_every == 0 or last or bad or row["spike"] or stop:
            self._log(row, load)
        if self.metrics:
            if line := self.plan_check.note(step, seconds):
                self.metrics.say(line)
            self.metrics.progress(step)
        self.watchdog.beat()
        self.progress.skipped += bad
        self.bad_steps.note(step, bad)
        if row["spike"] and trainer.on_spike == "stop":
            raise DivergedError(
                f"the loss of step {step} jumped to {row['loss']:.4f}, where trainer.on_spike=stop; the step was not "
                f"taken (nsa-train data inspect step={step} shows its rows)"
            )
        if step % trainer.val_every == 0 or last:
            self._validate()
        if stop or (trainer.checkpoint_every and (step % trainer.checkpoint_every == 0 or last)):
            self._save()
        if stop and not last:
            raise Interrupted(f"stopped after step {step}, checkpoint written; the same command goes on from there")

    # What a step needs ------------------------------------------------------------------------------------------------

    def _profiler(self) -> StepProfiler | None:
        profile = self.config.profile
        return StepProfiler(profile, self.folder.path / "profile", self.device) if profile.steps else None

    def _plan_check(self) -> PlanCheck:
        stage = self.loaders["train"].stage(self.progress.step)
        return PlanCheck(self.config, stage, self.world, runtime.device_name())

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches on the device; the time spent here is the loop's wait for data."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            on_device = batch.to(self.device) if batch else None
            self.clock.waited += time.perf_counter() - before
            if on_device is None:
                return
            yield on_device

    def _log(self, row: dict[str, Any], load: torch.Tensor) -> None:
        tokens = self.config.trainer.batch_rows * self.config.trainer.seq_len * self.clock.steps
        self.progress.last_speed = tokens / self.clock.elapsed()
        row |= {
            "tokens_per_s": self.progress.last_speed, "data_wait_ms": 1e3 * self.clock.waited / self.clock.steps,
            "mem_gib": runtime.peak_memory_gib(), "dead_experts": (self.load == 0).sum(1).tolist(),  # sync
        }  # fmt: skip
        self.load.zero_()
        if row["skipped"]:
            row["by_source"] = {}
        else:
            sum_over_ranks(row["by_source"])
            row["by_source"] = means(self.facts["sources"], row["by_source"])  # sync: of log steps only
        if self.metrics:
            self.metrics.train(row, load.tolist())
        self.clock.reset()

    def _enter(self, step: int) -> Stage:
        """The stage of a step, its positions set in the model."""
        stage = self.loaders["train"].stage(step)
        self.model.rope_factor = stage.rope_factor
        return stage

    def _validate(self) -> None:
        step = max(0, self.progress.step - 1)  # the rows that were trained on last
        self._enter(step)
        found = evaluate(
            self.model, self.loaders["heldout"], self.config.trainer, self.facts["sources"], self.device, step
        )
        self.progress.val_loss_last = found["loss"] if math.isfinite(found["loss"]) else None
        if self.progress.step == 0:
            self.progress.val_loss_first = self.progress.val_loss_last
        tokens = self.progress.step * self.config.trainer.batch_rows * self.config.trainer.seq_len
        if self.metrics:
            self.metrics.validation({"step": self.progress.step, "tokens": tokens, **found})
        self.watchdog.beat()
        self.clock.reset()

    def _measure_documents(self) -> None:
        found = document_losses(
            self.model, self.loaders["heldout"], self.config.trainer, self.config.attention.window,
            self.facts["sources"], self.device, self.config.trainer.steps - 1,
        )  # fmt: skip
        on_main(lambda: found.save(self.folder.path / HELDOUT))

    def _save(self) -> None:
        self.progress.wall_s = self._wall_s()
        state = {
            "progress": vars(self.progress).copy(),
            "loader": self.loaders["train"].state(self.progress.step, self.config.trainer.steps),
            "corpus_hash": self.facts["hash"],
            "wandb_id": self.wandb_id,
            "spikes": self.spikes.state(),
            "bad_steps_in_a_row": self.bad_steps.in_a_row,
            "load": self.load.tolist(),
        }
        checkpoint.save(
            self.checkpoints,
            self.progress.step,
            self.engine,
            self.identity,
            state,
            self.config.trainer.keep_checkpoints,
        )
        self.watchdog.beat()
        self.clock.reset()

    def _wall_s(self) -> float:
        return self.earlier + time.perf_counter() - self.started

    # What people read -------------------------------------------------------------------------------------------------

    def _open_metrics(self) -> Metrics:
        before = self.folder.read_json("manifest.json")
        self.wandb_id = self.wandb_id or before.get("wandb_id") or secrets.token_hex(4)
        steps, train, place = self.config.trainer.steps, self.loaders["train"], self.config.attention.selects_from
        manifest = {
            "corpus": {
                "name": self.facts["name"], "hash": self.facts["hash"], "epochs": train.epochs(steps),
                "share_past": {str(at): train.share_past(steps - 1, at) for at in (place, 2 * place)},
            },
            "tokenizer_sha256": self.facts["tokenizer_sha256"],
            "common_weights_sha256": common_hash(self.progress.initial_weights),
            "initial_weights_sha256": self.progress.initial_weights,
            "rows_fingerprint": train.fingerprint,
            # not of rows that an older version may have read
            "rows_sample_sha256": before.get("rows_sample_sha256") if before else train.sample_sha256(steps),
            "origin": self.progress.origin, "commit": runtime.git_commit(), "versions": runtime.versions(),
            "device": runtime.device_name(), "world_size": self.world,
            "cuda_graphs": self.config.in_graphs and against_replays(self.model, self.device) is None,
            "runs_a_device": max(runtime.runs_a_device(), before.get("runs_a_device", 1)), "wandb_id": self.wandb_id,
        }  # fmt: skip
        self.folder.bind()
        self.folder.write("manifest.json", manifest)
        self.folder.write("deepspeed.json", self.settings)
        return Metrics(self.config, self.folder.path, self.progress.step, manifest)

    def _announce(self) -> None:
        if not self.metrics:
            return
        config, trainer, corpus = self.config, self.config.trainer, self.facts["train"]
        loader, place = self.loaders["train"], config.attention.selects_from
        for line in (
            f"run {self.folder.path}: {config.arm} attention, {self.parameters['total'] / 1e6:.2f}M parameters, "
            f"{self.parameters['active'] / 1e6:.2f}M active, {self.world} x {runtime.device_name()}, "
            f"{str(runtime.dtype_of(trainer.dtype)).removeprefix('torch.')}",
            f"corpus {self.facts['name']} {self.facts['hash'][:12]}: {corpus['documents']} documents, "
            f"{corpus['tokens']:,} tokens",
            *(
                f"from step {stage.first_step}: {stage.batch_rows} rows of {stage.seq_len} tokens, "
                f"{loader.utilisation(stage.first_step):.1%} full, {loader.share_past(stage.first_step, place):.0%} of "
                f"their tokens past position {place} of a document, where NSA selects"
                for stage in self.stages
            ),
            f"{trainer.steps} steps, {_epochs(loader.epochs(trainer.steps))}; unigram entropy of the held-out text "
            f"{self.facts['unigram_entropy']:.4f} nats",
            *self.taken,
            f"resumed from {self.found.path} at step {self.progress.step}" if self.found else "starting at step 0",
        ):
            self.metrics.say(line)

    def _summarise(self, status: str, exit_code: int) -> None:
        progress, trainer = self.progress, self.config.trainer
        summary = {
            "status": status,
            "steps": progress.step,
            "tokens": progress.step * trainer.batch_rows * trainer.seq_len,
            "val_loss_first": progress.val_loss_first,
            "val_loss_last": progress.val_loss_last,
            "unigram_entropy": self.facts["unigram_entropy"],
            "exit_code": exit_code,
            "params_total": self.parameters["total"],
            "params_active": self.parameters["active"],
            "tokens_per_s": progress.last_speed,
            "skipped_steps": progress.skipped,
            "corpus_hash": self.facts["hash"],
            "wall_s": self._wall_s(),
        }
        self.folder.write("summary.json", summary)
        if self.metrics:
            self.metrics.close(summary)
            plot_losses(self.folder.path, self.config.name, self.facts["unigram_entropy"])
        if status == "done":
            runtime.log.info(
                "done: held-out loss %s -> %s nats per token (unigram entropy %.4f), corpus %s, %s tok/s, "
                "%.0f s\nrun folder: %s  (metrics.jsonl, loss.png, export/)",
                _nats(progress.val_loss_first), _nats(progress.val_loss_last), self.facts["unigram_entropy"],
                self.facts["hash"][:12],
                f"{progress.last_speed:,.0f}" if progress.last_speed else "-", self._wall_s(), self.folder.path,
            )  # fmt: skip


def _nats(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def on_main(work: Any) -> Any:
    """The result on rank 0, None elsewhere; nobody waits."""
    return work() if runtime.rank() == 0 else None


def _epochs(epochs: dict[str, float]) -> str:
    """Epochs of all sources in a few words."""
    shown = {name: f"{value:.2f}" for name, value in epochs.items()}
    if len(set(shown.values())) == 1:
        return f"{next(iter(shown.values()))} epochs"
    if len(shown) > 8:
        return f"{min(epochs.values()):.2f} to {max(epochs.values()):.2f} epochs of {len(shown)} sources"
    return "epochs " + ", ".join(f"{value} of {name}" for name, value in shown.items())
