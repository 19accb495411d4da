"""Ways to break the CUDA kernels, each of which a law must notice."""

from __future__ import annotations

OPS = "csrc/ops/"
# name: (op, or kernel file of one, file, old text, new text)
MUTANTS = {
    # barriers and waits
    "sum without its barrier": (
        "rms_norm",
        "csrc/cuda/prim.cuh",
        "room[threadIdx.x / kWarp] = v;\n  __syncthreads();",
        "room[threadIdx.x / kWarp] = v;",
    ),
    "barrier that one thread skips": (
        "rms_norm",
        "csrc/cuda/prim.cuh",
        "room[threadIdx.x / kWarp] = v;\n  __syncthreads();",
        "room[threadIdx.x / kWarp] = v;\n  if (threadIdx.x != 5) __syncthreads();",
    ),
    "ring without its barrier": (
        "matmul",
        "csrc/cuda/mma_tile.cuh",
        "__syncthreads();  // stage t is there for all",
        "// stage t is there for all",
    ),
    "ring without its wait": (
        "matmul",
        "csrc/cuda/mma_tile.cuh",
        "wait_copies<kStages - 2>();",
        "",
    ),
    "run of keys that is waited for too late": (
        "attention_decode",
        OPS + "attention_decode/attention_decode.cu",
        "wait_copies<R::kStages - 1>();",
        "wait_copies<R::kStages>();",
    ),
    "tokens changed under a running product": (
        "moe_matmul",
        OPS + "moe_matmul/moe_matmul.cuh",
        "__syncthreads();  // before the tokens and the ring are used again",
        "",
    ),
    "sums of warps read before they are there": (
        "matmul",
        "csrc/cuda/gemv.cuh",
        "products.write(room.of[warp]);\n    __syncthreads();",
        "products.write(room.of[warp]);",
    ),
    "sums of warps overwritten while they are read": (
        "moe_matmul",
        "csrc/cuda/gemv.cuh",
        "__syncthreads();  // all have read what the last call left in the room",
        "",
    ),
    # the last block to arrive
    "the first block to arrive norms": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "arrive(counter) == max(1, p.active * slices) - 1",
        "arrive(counter) == 0",
    ),
    "blocks of absent heads are waited for": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "max(1, p.active * slices) - 1",
        "H / G * slices - 1",
    ),
    "a counter is left as it is": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "if (shared.last) *counter = 0;",
        "",
    ),
    "every block moves on the history of B and C": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "if (!shared.last) return;\n    move_history<T>(a, p);",
        "move_history<T>(a, p);\n    if (!shared.last) return;",
    ),
    "the history of x stands still": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "if (moves) take_up(kept, now);",
        "",
    ),
    "state before its inputs are convolved": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "convolve_inputs<T>(a, p, shared.inputs);\n  __syncthreads();",
        "convolve_inputs<T>(a, p, shared.inputs);",
    ),
    "tracked heads are normed": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "active_size(m.seq_width, a.out_sizes, p.s, H)",
        "active_size(m.seq_width, m.h_sizes, p.s, H)",
    ),
    "padding has a step": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "if (p.slot >= 0) {",
        "if (true) {",
    ),
    "a width without heads keeps its history": (
        "mamba_step",
        OPS + "mamba_step/mamba_step.cu",
        "if (!p.mine && blockIdx.x > 0) return;",
        "if (!p.mine) return;",
    ),
    # launches that overlap
    "a norm does not wait for the launch ahead": (
        "rms_norm",
        OPS + "rms_norm/rms_norm.cu",
        "  begin_kernel();\n",
        "",
    ),
    "scores are read before they are there": (
        "moe_route",
        OPS + "moe_route/moe_route.cu",
        "  begin_kernel();\n  EI_DYNAMIC_SHARED(float, candidates);",
        "  EI_DYNAMIC_SHARED(float, candidates);\n  const float stale = scores[0];\n"
        "  begin_kernel();\n  if (stale != scores[0]) return;",
    ),
    # ragged ends
    "codes beyond the prefix": (
        "matmul",
        "csrc/cuda/gemv.cuh",
        "min(4, (columns - t * kTile) / kRun)",
        "4",
    ),
    "one key too many": (
        "attention_decode",
        OPS + "attention_decode/attention_decode.cu",
        "const bool there = key + r < q.end;",
        "const bool there = key + r <= q.end;",
    ),
    "one key too few": (
        "attention_prefill",
        OPS + "attention_prefill/attention_prefill.cu",
        "before + i / group + 1 : 0",
        "before + i / group : 0",
    ),
    "a step of columns beyond the prefix": (
        "matmul",
        "csrc/cuda/mma_tile.cuh",
        "min(4, (columns - t * 64) / 16)",
        "min(4, (columns - t * 64) / 16 + 1)",
    ),
    "a sequence cut by a run loses its first tokens": (
        "causal_conv",
        OPS + "causal_conv/causal_conv.cu",
        "max(end, start + kHistory) : end",
        "end : end",
    ),
    # segments of a scan
    "a segment knows nothing of those before it": (
        "ssm_scan",
        OPS + "ssm_scan/ssm_scan.cu",
        "h[i] = fused(decay, h[i], end[i])",
        "h[i] = end[i]",
    ),
    "a segment fades by its last chunk alone": (
        "ssm_scan",
        OPS + "ssm_scan/ssm_scan.cu",
        "faded += static_cast",
        "faded = static_cast",
    ),
    "a segment of one token is forgotten": (
        "ssm_scan",
        OPS + "ssm_scan/ssm_scan.cu",
        "lead + kSegment - 1) / kSegment",
        "lead + kSegment - 2) / kSegment",
    ),
    "segments begin within chunks": (
        "ssm_scan",
        OPS + "ssm_scan/ssm_scan.cu",
        "begin : begin - lead + k * kSegment",
        "begin : begin + k * kSegment",
    ),
    # codes and scales
    "a code loses its sign": (
        "matmul",
        "csrc/cuda/tiles.cuh",
        "(word << 4 & 0x81808180u)",
        "(word << 4 & 0x81800180u)",
    ),
    "an FP8 code loses its last bit": (
        "matmul",
        "csrc/cuda/tiles.cuh",
        "word >> 4 & 0x07f007f0u",
        "word >> 4 & 0x07f007e0u",
    ),
    "small block scales are halved": (
        "matmul",
        "csrc/cuda/tiles.cuh",
        "exponent = 4;",
        "exponent = 3;",
    ),
    "rows take the block scales of others": (
        "matmul",
        "csrc/cuda/tiles.cuh",
        "part.scales.word[1] >> step",
        "part.scales.word[0] >> step",
    ),
    "all segments have the first one's scale": (
        "matmul",
        "csrc/cuda/gemv.cuh",
        "scale.ptr<float>()[index]",
        "scale.ptr<float>()[0]",
    ),
    "the largest of a block ignores negative values": (
        "nvfp4_quantize",
        OPS + "nvfp4_quantize/nvfp4_quantize.cu",
        "max(amax, std::fabs(x[i]))",
        "max(amax, x[i])",
    ),
    # activations as codes
    "tokens take the block scales of others": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "m % 2, n % 4",
        "m % 2, 0",
    ),
    "weights take the block scales of others": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "m % 2, n % 4",
        "0, n % 4",
    ),
    "two codes of a row change places": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "v[column_of(h, i)]",
        "v[column_of(h, i ^ 1)]",
    ),
    "a row's scale is that of all its columns": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "b = threadIdx.x; b < blocks;",
        "b = threadIdx.x; b < q.tiles * 4;",
    ),
    "block scales beyond the prefix count": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "if (s < steps) word",
        "word",
    ),
    "steps and block scales are in another order": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "return s % 2 * 2 + s / 2;",
        "return s;",
    ),
    "ring of codes without its barrier": (
        "matmul_w4a4",
        "csrc/cuda/mma_tile.cuh",
        "__syncthreads();  // stage t is there for all",
        "// stage t is there for all",
    ),
    "ring of codes without its wait": (
        "matmul_w4a4",
        "csrc/cuda/mma_tile.cuh",
        "wait_copies<kStages - 2>();",
        "",
    ),
    "codes beyond a row's own tiles are read": (
        "matmul_w4a4",
        "csrc/cuda/w4a4.cuh",
        "return t * kTile < tokens_.columns[token];",
        "return tokens_.columns[token] > 0;",
    ),
    # experts by codes
    "rows of experts have the scale of all their columns": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "hidden_of(a, r), q, r",
        "static_cast<int>(a.x.shape[1]), q, r",
    ),
    "a middle has the scale of all its channels": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "width_of(a, m.entry[p] / m.J), q, p",
        "m.F, q, p",
    ),
    "a middle is as wide as another row": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "width_of(a, m.entry[p] / m.J)",
        "width_of(a, p / m.J)",
    ),
    "a middle is quantised before it is there": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "  begin_kernel();\n  const int p",
        "  const int p",
    ),
    "up products take the codes of another row": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "return kUp ? r : p;",
        "return kUp ? r / 2 : p;",
    ),
    "a row has the factor of another": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "q.factor[tokens.x[token]]",
        "q.factor[kUp ? tokens.x[0] : tokens.x[token]]",
    ),
    "all experts have the first one's scale": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul_w4a4.cu",
        "()[work.e]",
        "()[0]",
    ),
    "codes of entries changed under a running product": (
        "moe_matmul_w4a4",
        OPS + "moe_matmul/moe_matmul.cuh",
        "__syncthreads();  // before the tokens and the ring are used again",
        "",
    ),
    # products of warpgroups
    "products read a place of the ring that is written": (
        "matmul_wgmma",
        OPS + "matmul/matmul_wgmma.cu",
        "constexpr int kAhead = Shape::kStages - 2;",
        "constexpr int kAhead = Shape::kStages - 1;",
    ),
    "sums used before the last products are done": (
        "matmul_wgmma",
        OPS + "matmul/matmul_wgmma.cu",
        "wait_products<0>(sums_[0]);",
        "",
    ),
    "a descriptor of another row": (
        "matmul_wgmma",
        "csrc/cuda/prim_native.cuh",
        "uint64_t{1024 >> 4} << 32",
        "uint64_t{1152 >> 4} << 32",
    ),
    "columns of the weight beyond the prefix": (
        "matmul_wgmma",
        OPS + "matmul/matmul_wgmma.cu",
        "m < w_.rows && t * kTile + chunk * 8 < columns_",
        "m < w_.rows",
    ),
    "chunks are not swizzled": (
        "matmul_wgmma",
        OPS + "matmul/matmul_wgmma.cu",
        "(chunk ^ row % 8)",
        "chunk",
    ),
    "ring of a warpgroup without its barrier": (
        "matmul_wgmma",
        OPS + "matmul/matmul_wgmma.cu",
        "__syncthreads();  // tile t is there for all",
        "// tile t is there for all",
    ),
    # maps and slots
    "the first token that was drawn is fed to nobody": (
        "embed",
        OPS + "embed/embed.h",
        "if (from < 0) return a.ids",
        "if (from < 1) return a.ids",
    ),
    "a token that was not drawn is looked up": (
        "embed",
        OPS + "embed/embed.cu",
        "if (id < 0 || id >=",
        "if (id >=",
    ),
    "heads of a group side by side": (
        "ssm_step",
        "csrc/cuda/ssm.cuh",
        "head % a.groups",
        "head / static_cast<int>(a.state.shape[1] / a.groups)",
    ),
    "padding has a state": (
        "ssm_scan",
        OPS + "ssm_scan/ssm_scan.cu",
        "if (slot < 0 || head",
        "if (head",
    ),
    "padding has a history": (
        "causal_conv",
        OPS + "causal_conv/causal_conv.cu",
        "if (slot < 0 || t",
        "if (t",
    ),
    "padding has a place in the pages": (
        "kv_append",
        OPS + "kv_append/kv_append.cu",
        "if (slot < 0 || slot",
        "if (slot",
    ),
    # zeros and masks between widths
    "norm leaves the tail": (
        "rms_norm",
        OPS + "rms_norm/rms_norm.cu",
        "clear_row(out, n, D",
        "clear_row(out, D, D",
    ),
    "gated norm leaves the other heads": (
        "gated_norm",
        "csrc/cuda/mamba.cuh",
        "c < H / G * P",
        "c < kept * P",
    ),
    "attention leaves values in absent heads": (
        "attention_decode",
        OPS + "attention_decode/attention_decode.cu",
        "first_row + lane / 4 < q.active ? end - key : 0",
        "end - key",
    ),
    "prefill attends with absent heads": (
        "attention_prefill",
        OPS + "attention_prefill/attention_prefill.cu",
        "i < rows() && i % group < active ?",
        "i < rows() ?",
    ),
    "a row reads beyond its own columns": (
        "matmul",
        "csrc/cuda/mma_tile.cuh",
        "column < tokens_.columns[token];",
        "column < tokens_.columns[token] + 16;",
    ),
    "a narrow row keeps wide outputs": (
        "matmul",
        OPS + "matmul/matmul.cuh",
        "wanted ? activated<V>(a, sum(token, m)) : 0.0f",
        "activated<V>(a, sum(token, m))",
    ),
    "a row uses expert channels beyond its own": (
        "moe_matmul",
        OPS + "moe_matmul/moe_matmul.cuh",
        "kUp ? hidden_of(a, r) : width_of(a, r)",
        "kUp ? hidden_of(a, r) : m.F",
    ),
    "a row is routed to experts beyond its own": (
        "moe_route",
        OPS + "moe_route/moe_route.cu",
        "const int n = experts_of(a, r);",
        "const int n = E;",
    ),
}
