"""The planted faults of the CPU kernels, by kernel: one wrong line of `csrc/cpu`, and the test that must fail."""

from tools.gpu_emulation.planted_faults import Mutant

ADALN = "adaln_layer_norm/test_cpu.py::test_"
ADALN_SHAPES, ADALN_FORMS = ADALN + "accurate_over_shapes", ADALN + "accurate_over_modulation_forms"
ATTENTION = "block_causal_attention/test_cpu.py::test_"
RANGES, GROUPS = ATTENTION + "query_ranges", ATTENTION + "grouped_heads"
LSE, NOT_FINITE = ATTENTION + "log_sum_exp_and_its_gradient", ATTENTION + "non_finite_values_propagate"
NEAREST = "nearest_code/test_cpu.py::test_"
QUANTIZE = "multi_scale_quantize/test_cpu.py::test_"
BOTH_WAYS = QUANTIZE + "forward_and_backward"
QK_NORM = "qk_norm_cache/test_cpu.py::test_"
SAMPLE = "sample_tokens/test_cpu.py::test_"
SEEDS = SAMPLE + "seeds_stand_for_the_documented_noise"
GROUP_NORM = "inference/test_group_norm_silu.py::test_against_float64"
LINEAR = "inference/test_packed_linear.py::test_against_float64"
CONV = "inference/test_winograd_conv.py::test_against_float64"
LINEAR_ORDER = "inference/test_packed_linear.py::test_the_order_of_packed_weights"
CONV_ORDER = "inference/test_winograd_conv.py::test_the_order_of_packed_filters"

# Faults in lines that only the products of pairs of bf16 execute.
PAIRS = ("the last keys of a step are not cut off",)

MUTANTS = {
    # ---- what all kernels share
    "a worker leaves out its last task": Mutant(
        "dispatch.h", "task < begin_of(owner + 1);", "task + 1 < begin_of(owner + 1);",
        QK_NORM + "threads_and_runs_agree", representative=True),
    "a tail loses its last lane": Mutant(
        "isa.h", "(Vec)_mm512_maskz_loadu_ps((1u << n) - 1u, p)", "(Vec)_mm512_maskz_loadu_ps((1u << (n - 1)) - 1u, p)",
        ADALN_SHAPES),
    "a tail of 16 bits writes one lane too many": Mutant(
        "isa.h", "_mm256_mask_storeu_epi16(p, (1u << n) - 1u, lanes)",
        "_mm256_mask_storeu_epi16(p, (2u << n) - 1u, lanes)", QK_NORM + "against_float64"),
    "exp2 makes 0 of NaN": Mutant("isa.h", "_CMP_NLT_UQ", "_CMP_GE_OQ", NOT_FINITE),
    "exp2 has a wrong coefficient": Mutant("isa.h", "9.0170307e-3f", "9.1170307e-3f", ATTENTION + "large_logits"),
    "log has a wrong coefficient": Mutant("isa.h", "2.0f / 5", "2.0f / 5.1f", LSE),
    "a product leaves out its last row": Mutant(
        "gemm.h", "  gemm_rows<1, NV>(m, M, K, a, a_row, a_k, b, b_k, c, c_row, accumulate, ahead);\n", "", LINEAR),
    "a product overwrites the sum": Mutant(
        "gemm.h", "accumulate ? load(at) + acc[i][j] : acc[i][j]", "acc[i][j]", BOTH_WAYS),
    "two vectors of columns count as three": Mutant("gemm.h", "n += 2 * kWidth;", "n += 3 * kWidth;",
        ATTENTION + "head_dims"),
    # ---- adaln_layer_norm
    "eps is forgotten": Mutant(
        "adaln_layer_norm.isa.cpp", "/ float(channels) + a.eps)", "/ float(channels))", ADALN + "eps"),
    "a scale of 0 gives 0": Mutant(
        "adaln_layer_norm.isa.cpp", "normalised * (get(scale + c, part) + 1.0f)", "normalised * get(scale + c, part)",
        ADALN_SHAPES, representative=True),
    "missing channels count in the variance": Mutant(
        "adaln_layer_norm.isa.cpp", "existing(value(c, part) - mean, part)", "value(c, part) - mean", ADALN_SHAPES),
    "the norm is that of the sum before it is rounded": Mutant(
        "adaln_layer_norm.isa.cpp", "const Vec seen = rounded(residual, v);", "const Vec seen = v;",
        ADALN + "gated_is_the_composition"),
    "dx without the mean of g": Mutant("adaln_layer_norm.isa.cpp", "(g - mean_g - h", "(g - h", ADALN_SHAPES),
    "dgate from the gate": Mutant(
        "adaln_layer_norm.isa.cpp", "dgate.add(c, d * get(branch + c, part)", "dgate.add(c, d * get(gate + c, part)",
        ADALN_SHAPES),
    "the last partial sum is left out": Mutant(
        "adaln_layer_norm.isa.cpp", "i < count; ++i) sum += get(partial", "i + 1 < count; ++i) sum += get(partial",
        ADALN_SHAPES),
    "the branch decides the dtype of x": Mutant(
        "adaln_layer_norm.cpp", "mixed ? 2 + dtype_index(\"y\", y)", "mixed ? 5 - dtype_index(\"y\", y)",
        "adaln_layer_norm/test_cpu_mixed.py"),
    "one token of one sample has a row of its own": Mutant(
        "adaln_layer_norm.cpp", "if (samples == x.size(0) && tokens == x.size(1))", "if (tokens == x.size(1))",
        ADALN + "one_token_with_one_modulation_for_all_samples"),
    "partial sums depend on the number of threads": Mutant(
        "adaln_layer_norm.cpp", "std::max<int64_t>(1, ceil_div(x.size(1), kTokensPerPartial))",
        "std::min<int64_t>(std::max<int64_t>(x.size(1), 1), 3 * torch::stable::get_num_threads())",
        ADALN + "bit_equal_for_any_number_of_threads"),
    # ---- block_causal_attention
    "the first row of a scale sees the scale before it": Mutant(
        "block_causal_attention.cpp", "row < std::min(end - first, count)", "row < std::min(end - first + 1, count)",
        RANGES, representative=True),
    "the offset of the queries is ignored": Mutant(
        "block_causal_attention.cpp", "visible_keys(lens, q_offset, queries)", "visible_keys(lens, 0, queries)",
        RANGES),
    "ranges of keys depend on the number of threads": Mutant(
        "block_causal_attention.cpp", "std::min(ceil_div(wanted_tasks, pairs), p.keys / least_keys)",
        "std::min(ceil_div(wanted_tasks / 8 * int64_t(torch::stable::get_num_threads()), pairs), p.keys / least_keys)",
        ATTENTION + "bit_equal_across_runs_and_thread_counts"),
    "dq of the heads of a group is that of the first": Mutant(
        "block_causal_attention.cpp", "part + pair * ranges * share_floats + head % group * head_floats",
        "part + pair * ranges * share_floats", ATTENTION + "grouped_heads_over_many_keys"),
    "the last row of a chunk of dq is not summed": Mutant(
        "block_causal_attention.cpp", "std::min(begin + chunk, p.queries),", "std::min(begin + chunk - 1, p.queries),",
        ATTENTION + "schedules"),
    "the sum is not rescaled": Mutant(
        "block_causal_attention_forward.isa.cpp", "store(s.sum + r, load(s.sum + r) * factor);", "",
        ATTENTION + "large_logits"),
    "an invisible value is multiplied by 0": Mutant(
        "block_causal_attention_forward.isa.cpp", "if (first == 0) {", "if (first >= 0) {",
        ATTENTION + "a_bad_key_does_not_reach_rows_of_its_tile_that_do_not_see_it"),
    "a row sees the first invisible key": Mutant(
        "block_causal_attention_forward.isa.cpp", "int64_t key = max_i(visible[0] - begin, 0);",
        "int64_t key = max_i(visible[0] - begin + 1, 0);", ATTENTION + "schedules"),
    "heads of a group are not neighbours": Mutant(
        "block_causal_attention_forward.isa.cpp", "head = task.kv_head * group + unit / p.tile_count;",
        "head = task.kv_head + unit / p.tile_count * p.kv_heads;", GROUPS),
    "scores after the last key of few rows count": Mutant(
        "block_causal_attention_few_rows.h", "  for (int64_t c = seen; c % kWidth; ++c) row[c] = -kInfinity;\n", "",
        RANGES),
    "the sum of few rows is not rescaled": Mutant(
        "block_causal_attention_few_rows.h", "*sum = *sum * factor +", "*sum = *sum +",
        ATTENTION + "grouped_heads_over_many_keys"),
    "the gradient of lse is ignored": Mutant(
        "block_causal_attention_backward.isa.cpp", "(args.dlse ? args.dlse[first + r] : 0.0f)", "0.0f", LSE),
    "dq is not scaled": Mutant(
        "block_causal_attention_backward.isa.cpp", "kTileRows, p.softmax_scale);", "kTileRows, 1.0f);", RANGES),
    "dp of invisible keys stays": Mutant(
        "block_causal_attention_backward.isa.cpp", "    fill(dp + (key - begin) * lanes, hidden, 0.0f);\n", "",
        ATTENTION + "a_bad_key_does_not_reach_rows_of_its_tile_that_do_not_see_it"),
    "a share of dq that no key adds to is not cleared": Mutant(
        "block_causal_attention_backward.isa.cpp", "      memset(share, 0, rows * share_row * sizeof(float));\n", "",
        ATTENTION + "schedules"),
    "the last keys of a step are not cut off": Mutant(
        "block_causal_attention_pairs.h", "<< min_i(end - key, kStep))", "<< kStep)",
        ATTENTION + "a_bad_key_does_not_reach_rows_of_its_tile_that_do_not_see_it"),
    # ---- nearest_code
    "of equal codes in two strips the last": Mutant(
        "nearest_code.isa.cpp", "top > best[i].score ? IVec{}", "top >= best[i].score ? IVec{}",
        NEAREST + "first_of_two_equal_codes", representative=True),
    "of equal codes in a strip the last": Mutant(
        "nearest_code.isa.cpp", "for (int j = kVectors - 1; j >= 0; --j)", "for (int j = 0; j < kVectors; ++j)",
        NEAREST + "first_of_two_equal_codes"),
    "codes after the last one take part": Mutant(
        "nearest_code.isa.cpp", "    for (int64_t i = count; i < kWidth; ++i) start[i] = -kInfinity;\n", "",
        NEAREST + "nearest_within_rounding"),
    "codes shorter than 1e-6 are not normalised": Mutant(
        "nearest_code.isa.cpp", "squares < 1e-12f ? splat(1e-12f)", "squares < 1e-6f ? splat(1e-6f)",
        NEAREST + "cosine_of_tiny_codes"),
    "vectors are not counted from the centre": Mutant(
        "nearest_code.isa.cpp", "x[c] -= centre[c];", "x[c] -= 0.0f * centre[c];",
        NEAREST + "codes_far_from_the_origin"),
    "the centre counts for codes very far from 0 only": Mutant(
        "nearest_code.isa.cpp", "distance > high - low ? middle : Vec{}",
        "distance > (high - low) * 4096.0f ? middle : Vec{}", NEAREST + "codes_far_from_the_origin"),
    "the last of five rows is not searched": Mutant(
        "nearest_code.isa.cpp", "case 5: update<5>(", "case 5: update<4>(", NEAREST + "nearest_within_rounding"),
    # ---- multi_scale_quantize
    "windows of the pooling end too early": Mutant(
        "multi_scale_quantize_forward.isa.cpp", "((j + 1) * s.width + width - 1) / width", "(j + 1) * s.width / width",
        BOTH_WAYS, representative=True),
    "phi has the whole identity": Mutant(
        "multi_scale_quantize_forward.isa.cpp", "= 1.0f - ratio;", "= 1.0f;", BOTH_WAYS),
    "the taps of the adjoint are not mirrored": Mutant(
        "multi_scale_quantize_forward.isa.cpp", "(transposed ? 8 - tap : tap)", "tap", BOTH_WAYS),
    "f_hat is finite where f is not": Mutant(
        "multi_scale_quantize_forward.isa.cpp", " + (value - value);", ";", QUANTIZE + "non_finite_values"),
    "the error is that of the step": Mutant(
        "multi_scale_quantize_forward.isa.cpp", "squares += left * left;", "squares += step * step;", BOTH_WAYS),
    "tokens of a later group overwrite those of the first": Mutant(
        "multi_scale_quantize.cpp", "tokens[(first + row / scale.tokens())", "tokens[(row / scale.tokens())",
        BOTH_WAYS),
    "pooled vectors are not counted from the centre": Mutant(
        "multi_scale_quantize.cpp", "if (centre != nullptr) nearest.subtract", "if (false) nearest.subtract",
        QUANTIZE + "codes_far_from_the_origin"),
    "bicubic taps are one pixel off": Mutant(
        "multi_scale_quantize_plan.h", "below - 1 + j, 0, from - 1", "below + j, 0, from - 1", BOTH_WAYS),
    "the first scale has no later ones": Mutant(
        "multi_scale_quantize_backward.isa.cpp", "k = scales - 1; k >= 0; --k", "k = scales - 1; k > 0; --k",
        BOTH_WAYS),
    "the weight gradient keeps the last part only": Mutant(
        "multi_scale_quantize_backward.isa.cpp", "accumulate || begin > first", "accumulate", BOTH_WAYS),
    "gradients of the weights keep the last group only": Mutant(
        "multi_scale_quantize_backward.cpp", "thread_scratch(scratch), first > 0, dweight,",
        "thread_scratch(scratch), false, dweight,", BOTH_WAYS),
    "the last code of a thread gets no gradient": Mutant(
        "multi_scale_quantize_backward.cpp", "codes * (range + 1) / ranges, dcodebook",
        "codes * (range + 1) / ranges - 1, dcodebook", BOTH_WAYS),
    # ---- qk_norm_cache
    "keys go to the first row of the cache": Mutant(
        "qk_norm_cache.isa.cpp", "(a.start + token) * cache.per_token", "token * cache.per_token",
        QK_NORM + "against_float64", representative=True),
    "vectors shorter than 1e-6 are not normalised": Mutant(
        "qk_norm_cache.isa.cpp", "norm < 1e-12f ? 1e-12f : norm", "norm < 1e-6f ? 1e-6f : norm",
        QK_NORM + "short_vectors"),
    "values have the strides of the keys": Mutant(
        "qk_norm_cache.isa.cpp", "v_out + head * a.v.per_head", "v_out + head * a.k.per_head",
        QK_NORM + "caches_of_different_layouts"),
    # ---- sample_tokens
    "the budget of top-p is short by a thousandth": Mutant(
        "sample_tokens.isa.cpp", "a.dropped * total, key", "(a.dropped - 1e-3f) * total, key",
        SAMPLE + "top_p_uses_its_budget", representative=True),
    "top-k keeps one token too many": Mutant(
        "sample_tokens.isa.cpp", "    if (count > k)\n", "    if (count > k + 1)\n",
        SAMPLE + "the_kept_tokens_are_those_of_the_sorted_definition"),
    "all positions draw the same noise": Mutant(
        "sample_tokens.isa.cpp", "uint32_t(a.offset + token)", "uint32_t(a.offset)", SEEDS),
    "all samples have the seed of the first": Mutant("sample_tokens.isa.cpp", "a.seeds[sample]", "a.seeds[0]", SEEDS),
    "the second half of the seed is not used": Mutant(
        "sample_tokens.isa.cpp", "key1 = uint32_t(seed >> 32)", "key1 = 0 * uint32_t(seed >> 32)", SEEDS),
    "of equal winners the last": Mutant(
        "sample_tokens.isa.cpp", "at[i] < best)", "at[i] > best)", SAMPLE + "of_equal_winners_the_first_is_drawn"),
    "-0 is less than 0": Mutant(
        "sample_tokens.isa.cpp", "x = x == x ? x + 0.0f :", "x = x == x ? x :", SAMPLE + "equal_logits_on_the_border"),
    # ---- inference
    "chunks of pixels count alike": Mutant(
        "group_norm_silu.cpp", "pixels_of(chunk) * distance * distance", "kGroupNormPixels * distance * distance",
        GROUP_NORM, representative=True),
    "an odd last pixel is left out": Mutant(
        "group_norm_silu.isa.cpp", "    if (i < pixels) sums[0] += read(x + i * channels);\n", "", GROUP_NORM),
    "eps of the group norm is forgotten": Mutant("group_norm_silu.cpp", " + eps);", ");", GROUP_NORM),
    "images share the factors of the first": Mutant(
        "group_norm_silu.cpp", "channels, factor + image * channels, addend + image * channels, silu",
        "channels, factor, addend + image * channels, silu", GROUP_NORM),
    "later parts of the depth overwrite the first": Mutant(
        "packed_linear.isa.cpp", "scratch, width, k > 0,", "scratch, width, k > kDepth,", LINEAR, representative=True),
    "every strip has the bias of the first": Mutant(
        "packed_linear.isa.cpp", "load(a.bias + column + c)", "load(a.bias + c)", LINEAR),
    "the last rows are left out": Mutant(
        "packed_linear.cpp", "block + 1 == blocks ? rows : row_of(block + 1)", "row_of(block + 1)", LINEAR),
    "the right border is that of the next row": Mutant(
        "winograd_conv.isa.cpp", "s < 0 || s >= a.width)", "s < 0)", CONV, representative=True),
    "the residual is left out": Mutant(
        "winograd_conv.isa.cpp", "residual ? sums[j] + start + read(residual + at) :", "residual ? sums[j] + start :",
        CONV),
    "the point at infinity has a wrong sign": Mutant("winograd_conv.isa.cpp", " + m[5];", " - m[5];", CONV),
    "outputs beyond the border are written": Mutant(
        "winograd_conv.isa.cpp", "        if (j >= columns) break;\n", "", CONV),
    "the last row of a weight is not packed": Mutant(
        "packed_linear.isa.cpp", "row < outputs ? scalars_from", "row + 1 < outputs ? scalars_from", LINEAR_ORDER),
    "the last input of a weight is not packed": Mutant(
        "packed_linear.isa.cpp", "if (i < count) stream(", "if (i + 1 < count) stream(", LINEAR_ORDER),
    "the last filter is not packed": Mutant(
        "winograd_conv.isa.cpp", "column + lane < f.out_channels ?", "column + lane + 1 < f.out_channels ?",
        CONV_ORDER),
    "filters are transformed in one direction": Mutant(
        "winograd_conv.isa.cpp", "float(g[3 * q] * rows[p][0][lane] +", "float(g[3 * p] * rows[p][0][lane] +",
        CONV_ORDER),
}  # fmt: skip
