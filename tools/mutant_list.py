"""The mutants of `tools/mutants.py`: one wrong line each, and the tests that have to notice it.

A mutant that no longer fits the source (its snippet was edited) is moved to the new line; it is not removed, unless what it breaks is gone.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One wrong line.

    Args:
        name: what is wrong.
        file: the file that is changed, from the repository's root.
        old: part of one of its lines, which occurs once in the file.
        new: what stands there instead.
        tests: node ids (`file::function`) of the tests that have to fail, each alone; few and fast.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _in(file: str, *tests: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}::{test}" for test in tests)


TRAINING, EVALUATION, RECONSTRUCTION = (f"tasks/test_exact_{part}.py" for part in ("training", "evaluation", "reconstruction"))
LOSS = _in(TRAINING, "test_the_loss_and_its_parts_are_the_formulae_at_every_step")
UPDATES = _in(TRAINING, "test_every_update_average_and_rate_is_the_formulas")
VALIDATION = _in(EVALUATION, "test_validation_is_the_mean_over_images_that_count_under_its_own_noise")
PREDICTIONS = _in(EVALUATION, "test_predictions_are_nats_per_dimension_and_the_classes_log_probabilities")
CLASSES = _in(EVALUATION, "test_densities_per_class_stand_under_the_flows_own_prior")
LIKELIHOODS = _in(EVALUATION, "test_the_likelihoods_of_a_test_are_means_over_images_and_draws")
DISTANCES = _in(EVALUATION, "test_the_distances_and_reconstructions_of_a_test_are_the_formulae")
RULES = "guidance/test_rules.py"
PROGRESS = _in(RULES, "test_token_i_of_n_is_guided_at_progress_i_over_n_less_one")
COUPLINGS = _in("test_contracts.py", "test_couplings")
NORMALISED = _in("flows/test_flow.py", "test_normalisation_gives_unit_covariance")
KEYS = _in("test_randomness.py", "test_every_part_of_the_key_matters", "test_numbers_do_not_change_between_versions")
CROPS = _in("data/test_exact_draws.py", "test_crops_and_flips_are_drawn_anew_in_every_epoch")
SAMPLER = _in("data/test_sampler.py", "test_orders_differ_by_epoch_and_seed_and_can_be_repeated")
SKIPPED = _in("callbacks/test_non_finite.py", "test_a_bad_step_changes_nothing_and_the_next_one_proceeds")

OBJECTIVE = "srcflow/objectives/flow.py"
FLOW_TASK, FLOW, EVALUATOR = "srcflow/tasks/flow.py", "srcflow/flows/flow.py", "srcflow/tasks/flow_evaluation.py"

MUTANTS = [
    # --- objective ---
    Mutant("the latent norm leaves the input out", OBJECTIVE, "start=steps.y.square().mean())", "start=steps.y.new_zeros(()))", LOSS),
    Mutant("the latent norm counts the last block", OBJECTIVE, "for o in steps.blocks[:-1])", "for o in steps.blocks)", LOSS),
    Mutant("the latent norm has no weight", OBJECTIVE, "nll + latent_norm_weight * penalty", "nll + penalty", LOSS),
    Mutant("the log-determinant has the wrong sign", OBJECTIVE, "total = nll = prior - logdet", "total = nll = prior + logdet", LOSS),
    Mutant("the loss is per token", OBJECTIVE, "blocks[-1].z.shape[1:].numel())", "blocks[-1].z.shape[1])", LOSS),
    Mutant(
        "the prior leaves half of its constant out",
        "srcflow/flows/likelihood.py",
        "LOG_2PI = math.log(2.0 * math.pi)",
        "LOG_2PI = math.log(math.pi)",
        _in(TRAINING, "test_the_identity_has_the_entropy_of_the_normal_at_its_data"),
    ),
    Mutant("a prior's deviation has no volume", "srcflow/flows/likelihood.py", " - std.log().sum() - constant", " - constant", CLASSES),
    Mutant(
        "the denoiser learns the score's opposite",
        OBJECTIVE,
        "-deviation * score.detach())",
        "deviation * score.detach())",
        _in(TRAINING, "test_the_denoisers_error_is_that_of_the_scaled_score"),
    ),
    Mutant(
        "the learned prior moves by nine tenths",
        FLOW,
        "self.prior_variance.lerp(moments, rate)",
        "self.prior_variance.lerp(moments, 1 - rate)",
        _in(TRAINING, "test_the_learned_prior_moves_by_a_tenth_to_the_mean_square_of_the_noise"),
    ),
    # --- label dropout ---
    Mutant(
        "label dropout drops the same samples at every step",
        FLOW_TASK,
        'purpose="label_dropout", step=self.global_step,',
        'purpose="label_dropout", step=0,',
        _in(TRAINING, "test_labels_are_dropped_with_the_probability_and_others_at_every_step"),
    ),
    Mutant(
        "label dropout keeps what it should drop",
        FLOW_TASK,
        "self.label_dropout, seed=self.seed,",
        "1 - self.label_dropout, seed=self.seed,",
        _in(TRAINING, "test_labels_are_dropped_with_the_probability_and_others_at_every_step"),
    ),
    Mutant(
        "label dropout is keyed by the place in the batch",
        FLOW_TASK,
        'step=self.global_step, indices=batch["indices"]',
        "step=self.global_step, indices=range(len(labels))",
        _in(TRAINING, "test_what_is_dropped_depends_on_the_samples_index_not_on_its_place"),
    ),
    # --- validation, prediction, classes ---
    Mutant(
        "validation noise is training's",
        FLOW_TASK,
        'self.codes(batch, "validation", 0)',
        'self.codes(batch, "train", 0)',
        _in(EVALUATION, "test_validation_has_noise_of_its_own_the_same_every_time_and_training_other_noise_at_every_step"),
    ),
    Mutant(
        "validation noise changes with the step",
        FLOW_TASK,
        'self.codes(batch, "validation", 0)',
        'self.codes(batch, "validation")',
        _in(EVALUATION, "test_validation_has_noise_of_its_own_the_same_every_time_and_training_other_noise_at_every_step"),
    ),
    Mutant(
        "validation drops labels",
        FLOW_TASK,
        "codes.x, self.condition(batch, dropout=False), grid=codes.grid, std=std)",
        "codes.x, self.condition(batch, dropout=True), grid=codes.grid, std=std)",
        VALIDATION,
    ),
    Mutant(
        "validation ignores a learned prior",
        FLOW_TASK,
        "std = self.flow.prior_std if self.flow.learn_prior else None",
        "std = None",
        VALIDATION,
    ),
    Mutant(
        "validation is per channel",
        FLOW_TASK,
        "dims = self.flow.channels * self.flow.grid[0] * self.flow.grid[1]",
        "dims = self.flow.channels",
        VALIDATION,
    ),
    Mutant("predict is not divided by the dimensions", FLOW_TASK, " / codes.x.shape[1:].numel()", "", PREDICTIONS),
    Mutant("predict takes test's noise", FLOW_TASK, 'self.codes(batch, "predict", 0)', 'self.codes(batch, "test", 0)', PREDICTIONS),
    Mutant(
        "predict gives joint densities",
        FLOW_TASK,
        "self.flow.class_log_probs(codes.x, grid=codes.grid).log_softmax(1)",
        "self.flow.class_log_probs(codes.x, grid=codes.grid)",
        PREDICTIONS,
    ),
    Mutant(
        "class_log_probs ignores a learned prior",
        FLOW,
        "columns.append(normal_log_prob(z, self._prior(z.shape[1])) + total)",
        "columns.append(normal_log_prob(z) + total)",
        CLASSES,
    ),
    Mutant(
        "class_log_probs forgets the blocks without a class",
        FLOW,
        "            z, total = y, logdet",
        "            z, total = y, logdet * 0",
        CLASSES,
    ),
    # --- couplings, normalisation, permutation, sampling ---
    Mutant(
        "the affine log-determinant has the wrong sign",
        "srcflow/couplings/affine.py",
        "return (x - m) * torch.exp(-a), -a",
        "return (x - m) * torch.exp(-a), a",
        COUPLINGS,
    ),
    Mutant(
        "the softplus scale is not that of zero parameters",
        "srcflow/couplings/softplus_affine.py",
        "OFFSET = math.log(math.e - 1.0)",
        "OFFSET = math.log(math.e)",
        _in("flows/test_flow.py", "test_a_fresh_flow_is_the_identity"),
    ),
    Mutant(
        "the additive inverse shifts the wrong way",
        "srcflow/couplings/additive.py",
        "return z + params.squeeze(-2)",
        "return z - params.squeeze(-2)",
        COUPLINGS,
    ),
    Mutant(
        "a normalisation's log-determinant is one token's",
        "srcflow/flows/normalization.py",
        "-self.std.to(dtype).log().sum().mul(x.shape[1]).expand",
        "-self.std.to(dtype).log().sum().expand",
        LOSS,
    ),
    Mutant(
        "a normalisation divides by the variance",
        "srcflow/flows/normalization.py",
        "covariance.diagonal().sqrt())",
        "covariance.diagonal())",
        NORMALISED,
    ),
    Mutant(
        "whitening forgets the mean on the way back",
        "srcflow/flows/normalization.py",
        "self.factor.to(dtype).T + self.mean",
        "self.factor.to(dtype).T",
        NORMALISED,
    ),
    Mutant(
        "no block is run in reverse",
        "srcflow/nn/permutation.py",
        'x if order == "raster" else x.flip(1)',
        "x",
        LOSS,
    ),
    Mutant(
        "sampling feeds the noise back",
        "srcflow/solvers/sequential.py",
        "params = block.extend(u[:, i : i + 1], i, state)",
        "params = block.extend(z[:, i : i + 1], i, state)",
        _in("flows/test_flow.py", "test_blocks_invert_one_by_one"),
    ),
    Mutant(
        "sampling has one temperature",
        FLOW,
        "invert(self, z * temperature, ctx",
        "invert(self, z, ctx",
        _in("flows/test_flow.py", "test_temperature_multiplies_the_noise"),
    ),
    Mutant(
        "samples are not drawn from the learned prior",
        "srcflow/pipeline.py",
        "z = z * flow.prior_std",
        "z = z * 1",
        _in(EVALUATION, "test_samples_are_drawn_from_the_learned_prior"),
    ),
    Mutant(
        "denoising moves by the deviation, not by the variance",
        "srcflow/flows/denoise.py",
        "leaf.detach() + deviation**2 * score",
        "leaf.detach() + deviation * score",
        _in("flows/test_denoise.py", "test_the_posterior_mean_of_a_gaussian"),
    ),
    Mutant(
        "attention temperature multiplies",
        "srcflow/nn/attention.py",
        "q = q / temperature.to(q)",
        "q = q * temperature.to(q)",
        _in("nn/test_attention.py", "test_a_temperature_divides_the_logits"),
    ),
    # --- guidance ---
    Mutant(
        "the ratio of variances is not clipped",
        "srcflow/guidance/gaussian.py",
        ".clamp(max=0.0)",
        "",
        _in(RULES, "test_gaussian_guidance_takes_a_wider_positive_density_for_as_wide_as_the_negative_one"),
    ),
    Mutant(
        "Gaussian guidance narrows twice as much",
        "srcflow/guidance/gaussian.py",
        "- 0.5 * torch.log(d)",
        "- torch.log(d)",
        _in(RULES, "test_gaussian_guidance_is_the_product_of_densities_where_the_positive_one_is_narrower"),
    ),
    Mutant(
        "linear guidance pushes the shift from the log-scale",
        "srcflow/guidance/linear.py",
        "shift + w * (shift - negative.shift)",
        "shift + w * (shift - negative.log_scale)",
        _in(RULES, "test_linear_guidance_extrapolates_what_it_names"),
    ),
    Mutant(
        "an annealed strength is a constant one",
        "srcflow/guidance/schedules.py",
        "return self.strength * progress",
        "return self.strength * torch.ones_like(progress)",
        PROGRESS,
    ),
    Mutant(
        "an interval leaves its end out",
        "srcflow/guidance/schedules.py",
        "(progress <= self.stop)",
        "(progress < self.stop)",
        _in("guidance/test_schedules.py", "test_an_interval_includes_its_ends"),
    ),
    Mutant(
        "guidance lags a token behind its schedule",
        "srcflow/guidance/guided.py",
        "streams.progress[at + 1 : at + 1 + m]",
        "streams.progress[at : at + m]",
        PROGRESS,
    ),
    # --- randomness and noise ---
    Mutant("keys forget the step", "srcflow/randomness.py", "{seed}/{purpose}/{step}/{index}", "{seed}/{purpose}/{index}", KEYS),
    Mutant("keys forget the sample", "srcflow/randomness.py", "{seed}/{purpose}/{step}/{index}", "{seed}/{purpose}/{step}", KEYS),
    Mutant(
        "coins fall on the other side",
        "srcflow/randomness.py",
        "indices=indices) < probability",
        "indices=indices) > probability",
        _in("test_randomness.py", "test_laws"),
    ),
    Mutant(
        "noise of many numbers takes the place for the index",
        "srcflow/randomness.py",
        "generator(seed, purpose, step, ids[b])",
        "generator(seed, purpose, step, b)",
        _in("test_randomness.py", "test_rows_do_not_depend_on_the_batch"),
    ),
    Mutant(
        "a level of noise is drawn under the noise's own key",
        "srcflow/noise.py",
        'purpose=purpose + ".level"',
        "purpose=purpose",
        _in(RECONSTRUCTION, "test_the_decoders_loss_is_that_of_clean_images_from_noisy_features"),
    ),
    Mutant(
        "dequantisation fills half a grey level",
        "srcflow/noise.py",
        "mul_(2.0 / self.levels)",
        "mul_(1.0 / self.levels)",
        _in("test_noise.py", "test_dequantisation_fills_one_grey_level"),
    ),
    # --- metrics ---
    Mutant(
        "a Frechet distance takes the root once",
        "srcflow/metrics/frechet.py",
        "- 2 * root",
        "- root",
        _in("metrics/test_frechet.py", "test_closed_forms"),
    ),
    Mutant(
        "a Frechet distance's covariances are biased",
        "srcflow/metrics/frechet.py",
        "torch.outer(mean, mean)) / (n - 1)",
        "torch.outer(mean, mean)) / n",
        _in("metrics/test_frechet.py", "test_streaming_equals_all_at_once_for_any_batches"),
    ),
    Mutant(
        "a neighbour is the sample itself",
        "srcflow/metrics/precision_recall.py",
        "kthvalue(self.k + 1, dim=1)",
        "kthvalue(self.k, dim=1)",
        _in("metrics/test_precision_recall.py", "test_against_the_definition"),
    ),
    Mutant(
        "precision is recall",
        "srcflow/metrics/precision_recall.py",
        '{"precision": self._share(fake, real), "recall": self._share(real, fake)}',
        '{"precision": self._share(real, fake), "recall": self._share(fake, real)}',
        _in("metrics/test_precision_recall.py", "test_mode_collapse_is_precise_and_recalls_nothing"),
    ),
    Mutant(
        "a grey level's width is taken off",
        "srcflow/metrics/likelihood.py",
        "/ math.log(2) - math.log2(bin_width)",
        "/ math.log(2) + math.log2(bin_width)",
        _in(EVALUATION, "test_bits_per_dimension_of_pixels_count_the_width_of_a_grey_level"),
    ),
    Mutant("the Gaussian baseline has no volume", "srcflow/metrics/likelihood.py", " + factor.diagonal().log().sum()", "", LIKELIHOODS),
    Mutant(
        "the marginal is a sum over classes",
        EVALUATOR,
        "torch.logsumexp(densities, 1) - math.log(self.flow.num_classes)",
        "torch.logsumexp(densities, 1)",
        LIKELIHOODS,
    ),
    Mutant(
        "the class is decided by the last draw",
        EVALUATOR,
        "joint = joint + densities",
        "joint = densities",
        _in(EVALUATION, "test_the_class_is_decided_by_all_draws"),
    ),
    Mutant(
        "every draw has the same noise",
        EVALUATOR,
        'self.task.codes(features, "test", k)',
        'self.task.codes(features, "test", 0)',
        LIKELIHOODS,
    ),
    Mutant("PSNR is that of amplitudes", "srcflow/metrics/reconstruction.py", "return -10 * error", "return -20 * error", DISTANCES),
    Mutant(
        "L1 is the error's mean",
        "srcflow/metrics/reconstruction.py",
        "(pred - target).abs().flatten(1).mean(1)",
        "(pred - target).flatten(1).mean(1)",
        DISTANCES,
    ),
    Mutant(
        "padding counts in metrics",
        "srcflow/metrics/double_metric.py",
        "[t[valid.to(t.device)] for t in tensors]",
        "[t for t in tensors]",
        _in("metrics/test_reconstruction.py", "test_any_batches_and_padding"),
    ),
    # --- statistics ---
    Mutant(
        "merged moments leave the means' distance out",
        "srcflow/statistics.py",
        "self._m2 + m2 + self._outer(delta) * (self.count * (count / total))",
        "self._m2 + m2",
        _in("test_statistics.py", "test_any_batching_order_and_rank_count_gives_the_same"),
    ),
    Mutant(
        "merged means are not weighted",
        "srcflow/statistics.py",
        "self._mean + delta * (count / total)",
        "self._mean + delta * 0.5",
        _in("test_statistics.py", "test_any_batching_order_and_rank_count_gives_the_same"),
    ),
    Mutant(
        "covariances are unbiased",
        "srcflow/statistics.py",
        "(m2 + m2.T) / (2 * self.count)",
        "(m2 + m2.T) / (2 * self.count - 2)",
        _in(TRAINING, "test_the_normalisation_is_fitted_on_noisy_training_codes"),
    ),
    # --- data ---
    Mutant(
        "every epoch has the same order", "srcflow/data/sampler.py", 'purpose="order", step=epoch)', 'purpose="order", step=0)', SAMPLER
    ),
    Mutant(
        "ranks take contiguous parts",
        "srcflow/data/sampler.py",
        "position = i * self.world_size + self.rank",
        "position = i + self.num_samples * self.rank",
        _in("data/test_sampler.py", "test_global_batches_do_not_depend_on_the_rank_count"),
    ),
    Mutant(
        "padding is taken for samples",
        "srcflow/data/sampler.py",
        "valid = position < self.total",
        "valid = True",
        _in("data/test_sampler.py", "test_evaluation_sees_each_sample_once_in_equally_many_steps"),
    ),
    Mutant(
        "crops are the same in every epoch",
        "srcflow/data/transforms.py",
        'generator(self.seed, "crop", epoch, index)',
        'generator(self.seed, "crop", 0, index)',
        _in("data/test_exact_draws.py", "test_crops_and_flips_are_drawn_anew_in_every_epoch"),
    ),
    Mutant(
        "flips are the same in every epoch",
        "srcflow/data/transforms.py",
        'generator(self.seed, "flip", epoch, index)',
        'generator(self.seed, "flip", 0, index)',
        _in("data/test_exact_draws.py", "test_crops_and_flips_are_drawn_anew_in_every_epoch"),
    ),
    Mutant("a flip turns images upside down", "srcflow/data/transforms.py", "pixels = pixels[:, ::-1]", "pixels = pixels[::-1]", CROPS),
    Mutant(
        "labels are the samples' indices",
        "srcflow/data/batches.py",
        'torch.tensor([s["label"] for s in samples]',
        'torch.tensor([s["index"] for s in samples]',
        _in("data/test_exact_draws.py", "test_a_batch_keeps_each_samples_own_fields"),
    ),
    Mutant(
        "batches forget what is padding",
        "srcflow/data/batches.py",
        'torch.tensor([s["valid"] for s in samples]',
        "torch.tensor([True for s in samples]",
        _in("data/test_exact_draws.py", "test_a_batch_keeps_each_samples_own_fields"),
    ),
    Mutant(
        "stored labels are another row's",
        "srcflow/data/feature_store.py",
        "torch.from_numpy(self.labels[rows])",
        "torch.from_numpy(self.labels[rows - 1])",
        _in("data/test_feature_store.py", "test_what_is_written_is_read"),
    ),
    Mutant(
        "shards come in the same order in every epoch",
        "srcflow/data/shard_plan.py",
        'purpose="shards", step=epoch)',
        'purpose="shards", step=0)',
        _in("data/test_exact_draws.py", "test_shards_come_in_another_order_in_every_epoch"),
    ),
    Mutant(
        "a span always begins where it can",
        "srcflow/data/shard_plan.py",
        "start += int(generator(",
        "start += 0 * int(generator(",
        _in("data/test_shard_plan.py", "test_equal_shards_are_read_from_their_starts_and_nothing_is_left_out_for_ever"),
    ),
    Mutant(
        "all streams are shuffled alike",
        "srcflow/data/shard_plan.py",
        'generator(self.seed, "stream", epoch, stream)',
        'generator(self.seed, "stream", epoch, 0)',
        _in("data/test_exact_draws.py", "test_streams_are_shuffled_each_in_its_own_order"),
    ),
    Mutant(
        "a piece begins at its shard's start",
        "srcflow/data/shard_plan.py",
        "start - begin, end - start)",
        "0, end - start)",
        _in("data/test_shard_plan.py", "test_pieces_of_a_sequence"),
    ),
    Mutant(
        "the shuffle buffer gives a sample twice",
        "srcflow/data/shard_plan.py",
        "pool[j] = k + buffer",
        "pool[j] = k",
        _in("data/test_shard_plan.py", "test_a_reader_holds_no_more_than_the_buffer"),
    ),
    # --- averages, schedule, optimisation, guard ---
    Mutant("the average keeps the new weights", "srcflow/callbacks/ema.py", "weight=1 - decay", "weight=decay", UPDATES),
    Mutant(
        "the average's warm-up is ten times as long",
        "srcflow/callbacks/ema.py",
        "(1 + self.updates) / (10 + self.updates)",
        "(1 + self.updates) / (100 + self.updates)",
        UPDATES,
    ),
    Mutant(
        "a skipped step moves the average",
        "srcflow/callbacks/ema.py",
        "if not step_was_skipped(trainer):",
        "if True:",
        _in("tasks/test_exact_training.py", "test_a_dropped_step_moves_neither_weights_nor_average"),
    ),
    Mutant(
        "validation sees the trained weights",
        "srcflow/callbacks/ema.py",
        "parameters[k].copy_(s)",
        "parameters[k].copy_(parameters[k])",
        _in(EVALUATION, "test_validation_during_fit_is_of_the_averaged_weights"),
    ),
    Mutant(
        "the warm-up is a step ahead",
        "srcflow/learning_rates.py",
        "(peak - minimum) * step / warmup",
        "(peak - minimum) * (step + 1) / warmup",
        UPDATES,
    ),
    Mutant(
        "the cosine begins before the warm-up",
        "srcflow/learning_rates.py",
        "(step - warmup) / (total - warmup)",
        "step / total",
        UPDATES,
    ),
    Mutant(
        "biases decay too",
        "srcflow/tasks/optimization.py",
        "decayed = [p for p in trained if p.ndim >= 2]",
        "decayed = [p for p in trained if p.ndim >= 1]",
        _in("tasks/test_optimization.py", "test_what_decays"),
    ),
    Mutant(
        "AdamW has its own betas",
        "srcflow/tasks/optimization.py",
        '{"betas": BETAS if self.betas is None else self.betas})',
        "{})",
        UPDATES,
    ),
    Mutant(
        "the decay of WSD begins an update early",
        "srcflow/learning_rates.py",
        "x = (step - (total - decay)) / decay",
        "x = (step + 1 - (total - decay)) / decay",
        _in("test_learning_rates.py", "test_wsd_is_flat_until_its_last_updates"),
    ),
    Mutant(
        "another optimizer loses its arguments",
        "srcflow/tasks/optimizers.py",
        "cls(groups, lr=learning_rate, **self.arguments)",
        "cls(groups, lr=learning_rate)",
        _in("tasks/test_optimization.py", "test_another_optimizer_steps_with_its_arguments_the_rate_and_the_decay"),
    ),
    Mutant(
        "gradients are not clipped",
        "srcflow/callbacks/non_finite.py",
        "limit = self.gradient_clip if self.gradient_clip is not None",
        "limit = float('inf') if self.gradient_clip is not None",
        UPDATES,
    ),
    Mutant(
        "a step is dropped only if loss and gradient are bad",
        "srcflow/callbacks/non_finite.py",
        "math.isfinite(self.loss) and math.isfinite(self.norm)",
        "math.isfinite(self.loss) or math.isfinite(self.norm)",
        SKIPPED,
    ),
    Mutant(
        "good steps are counted as bad in a row",
        "srcflow/callbacks/non_finite.py",
        "            self.in_a_row = 0",
        "            self.in_a_row += 1",
        SKIPPED,
    ),
    # --- stages 0 and 1 ---
    Mutant(
        "pixels have no weight",
        "srcflow/objectives/reconstruction.py",
        "total + weights.pixel * pixels",
        "total + pixels",
        _in(RECONSTRUCTION, "test_the_decoders_loss_is_that_of_clean_images_from_noisy_features"),
    ),
    Mutant(
        "the perceptual loss counts from the first step",
        "srcflow/tasks/reconstruction.py",
        "self.global_step >= self.perceptual_from",
        "True",
        _in(RECONSTRUCTION, "test_the_decoders_loss_is_that_of_clean_images_from_noisy_features"),
    ),
    Mutant(
        "evaluation noise is training's",
        "srcflow/tasks/reconstruction.py",
        'self.eval_noise if noisy else None, 0, "evaluation"',
        'self.eval_noise if noisy else None, 0, "train"',
        _in(RECONSTRUCTION, "test_evaluation_of_the_autoencoder_counts_every_image_once_with_and_without_noise"),
    ),
    Mutant(
        "the compressor is to give noisy features",
        "srcflow/tasks/compressor.py",
        "clean = chain.under(None).normalized(",
        "clean = chain.normalized(",
        _in(RECONSTRUCTION, "test_the_compressors_loss_asks_for_clean_features_and_images"),
    ),
    Mutant(
        "the feature loss is all cosine",
        "srcflow/losses/reconstruction.py",
        "(pred - target).square().mean() + (1 -",
        "(1 -",
        _in(RECONSTRUCTION, "test_the_compressors_loss_asks_for_clean_features_and_images"),
    ),
]
