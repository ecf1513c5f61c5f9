//! The kernel files, each as one self-contained translation unit.
//!
//! A unit is `common.cuh`, the header that some files share, then the file, joined by `#line` directives so that compiler
//! messages name the places that people edit. Nothing is included by name: binaries are kept by the text that they were
//! made of, so an edited header behind an `#include` would load a stale one. A file whose kernels take tensors of either
//! type makes two units; in that of bfloat16, `BF16` is defined and each kernel is renamed.

/// The text in front of every unit.
const COMMON: &str = include_str!("../../../cuda/common.cuh");

/// What the files of attention share.
const ATTENTION: &str = include_str!("../../../cuda/attention.cuh");

/// What the files share that compute by tiles in float32.
const TILES: &str = include_str!("../../../cuda/tiles.cuh");

/// Registers and shared memory of each kernel by architecture, as TOML: what estimates of occupancy start from.
pub const BARS: &str = include_str!("../../../cuda/bars.toml");

/// One translation unit.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name: that of its file without extension, `loss`, and `loss_bf16` for tensors of bfloat16.
    pub name: &'static str,
    /// The `extern "C"` kernels it defines.
    pub kernels: &'static [&'static str],
    file: &'static str,
    text: &'static str,
}

macro_rules! source {
    ($name:literal of $file:literal, $($kernel:literal),+ $(,)?) => {
        Source {
            name: $name,
            kernels: &[$($kernel),+],
            file: concat!($file, ".cu"),
            text: include_str!(concat!("../../../cuda/", $file, ".cu")),
        }
    };
    ($name:literal, $($kernel:literal),+ $(,)?) => { source!($name of $name, $($kernel),+) };
}

/// All units, by name.
pub const SOURCES: &[Source] = &[
    source!(
        "attention",
        "attention_delta_backward_f32",
        "attention_dkv_backward_f32",
        "attention_dq_backward_f32",
        "attention_forward_f32",
    ),
    source!(
        "attention_bf16",
        "attention128_dkv_backward_bf16",
        "attention128_dq_backward_bf16",
        "attention128_forward_bf16",
        "attention256_dkv_backward_bf16",
        "attention256_dq_backward_bf16",
        "attention256_forward_bf16",
        "attention64_dkv_backward_bf16",
        "attention64_dq_backward_bf16",
        "attention64_forward_bf16",
        "attention_delta_backward_bf16",
    ),
    source!("best", "best_forward_f32"),
    source!(
        "cache",
        "cache_write_forward_f32",
        "cached_attention_forward_f32",
        "cached_attention_join_forward_f32"
    ),
    source!(
        "cache_bf16" of "cache",
        "cache_write_forward_bf16",
        "cached_attention_forward_bf16",
        "cached_attention_join_forward_bf16"
    ),
    source!(
        "elementwise",
        "add_forward_f32",
        "broadcast_forward_f32",
        "div_forward_f32",
        "dropout_forward_f32",
        "epilogue_forward_f32",
        "exp_backward_f32",
        "exp_forward_f32",
        "fill_forward_f32",
        "gated_backward_f32",
        "gated_forward_f32",
        "gelu_backward_f32",
        "gelu_forward_f32",
        "gelu_tanh_backward_f32",
        "gelu_tanh_forward_f32",
        "mish_backward_f32",
        "mish_forward_f32",
        "mul_forward_f32",
        "quick_gelu_backward_f32",
        "quick_gelu_forward_f32",
        "relu2_backward_f32",
        "relu2_forward_f32",
        "relu_backward_f32",
        "relu_forward_f32",
        "scale_forward_f32",
        "sigmoid_backward_f32",
        "sigmoid_forward_f32",
        "sign_backward_f32",
        "sign_forward_f32",
        "silu_backward_f32",
        "silu_forward_f32",
        "sqrt_backward_f32",
        "sqrt_forward_f32",
        "sub_forward_f32",
        "tanh_backward_f32",
        "tanh_forward_f32",
    ),
    source!("elementwise_bf16" of "elementwise", "add_forward_bf16", "broadcast_forward_bf16", "div_forward_bf16", "dropout_forward_bf16", "epilogue_forward_bf16", "exp_backward_bf16", "exp_forward_bf16", "fill_forward_bf16", "gated_backward_bf16",
        "gated_forward_bf16",
        "gelu_backward_bf16", "gelu_forward_bf16", "gelu_tanh_backward_bf16", "gelu_tanh_forward_bf16", "mish_backward_bf16", "mish_forward_bf16", "mul_forward_bf16", "narrow_forward_bf16", "quick_gelu_backward_bf16", "quick_gelu_forward_bf16", "relu2_backward_bf16", "relu2_forward_bf16", "relu_backward_bf16", "relu_forward_bf16", "scale_forward_bf16", "sigmoid_backward_bf16", "sigmoid_forward_bf16", "sign_backward_bf16", "sign_forward_bf16", "silu_backward_bf16", "silu_forward_bf16", "sqrt_backward_bf16", "sqrt_forward_bf16", "sub_forward_bf16", "tanh_backward_bf16", "tanh_forward_bf16", "widen_forward_bf16"),
    source!("loss", "cross_entropy_backward_f32", "cross_entropy_forward_f32"),
    source!("loss_bf16" of "loss", "cross_entropy_backward_bf16", "cross_entropy_forward_bf16"),
    source!("norm", "layer_norm_backward_f32", "layer_norm_forward_f32", "layer_norm_weight_backward_f32",),
    source!("norm_bf16" of "norm", "layer_norm_backward_bf16", "layer_norm_forward_bf16", "layer_norm_weight_backward_bf16"),
    source!("optimizer", "adamw_forward_f32"),
    source!(
        "positions",
        "alibi_bias_forward_f32",
        "iota_forward_f32",
        "rope_forward_f32",
        "rope_table_forward_f32",
    ),
    source!("positions_bf16" of "positions", "rope_forward_bf16"),
    source!(
        "reduce",
        "clip_factor_forward_f32",
        "global_norm_forward_f32",
        "global_norm_parts_forward_f32",
        "sum_forward_f32",
        "sum_to_forward_f32",
    ),
    source!("reduce_bf16" of "reduce", "sum_forward_bf16", "sum_to_forward_bf16"),
    source!(
        "relative",
        "relative_attention_dkinds_backward_f32",
        "relative_attention_dkv_backward_f32",
        "relative_attention_dq_backward_f32",
        "relative_attention_dr_backward_f32",
        "relative_attention_forward_f32",
    ),
    source!("rows", "count_labels_forward_f32", "gather_forward_f32", "scatter_add_forward_f32",),
    source!("rows_bf16" of "rows", "gather_forward_bf16", "gather_narrow_forward_bf16", "scatter_add_forward_bf16"),
];

/// The unit that defines `kernel`.
#[must_use]
pub fn of_kernel(kernel: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|s| s.kernels.contains(&kernel))
}

/// Bytes of shared memory that launches of `kernel` ask for, beside what it declares.
#[must_use]
pub fn dynamic_bytes(kernel: &str) -> usize {
    let bars = BARS.split_once(&format!("[{kernel}]\n")).map_or("", |(_, rest)| rest);
    let line =
        bars.lines().take_while(|l| !l.starts_with('[')).find_map(|l| l.strip_prefix("dynamic_bytes = "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

impl Source {
    /// Whether it is the second unit of its file, for tensors of bfloat16.
    fn is_bf16(&self) -> bool {
        self.name.strip_suffix("_bf16").is_some_and(|file| self.file.strip_suffix(".cu") == Some(file))
    }

    /// The text to hand to NVRTC. It includes nothing.
    #[must_use]
    pub fn unit(&self) -> String {
        let mut unit = String::new();
        if self.is_bf16() {
            unit.push_str("#define BF16\n");
            for kernel in self.kernels {
                let stem = kernel.strip_suffix("bf16").unwrap_or(kernel);
                unit.push_str(&format!("#define {stem}f32 {kernel}\n"));
            }
        }
        let masks = self.file.starts_with("attention") || self.file == "relative.cu";
        let tiles = matches!(self.file, "attention.cu" | "relative.cu");
        let heads =
            [("common.cuh", COMMON, true), ("attention.cuh", ATTENTION, masks), ("tiles.cuh", TILES, tiles)];
        for (name, text, _) in heads.into_iter().chain([(self.file, self.text, true)]).filter(|part| part.2) {
            unit.push_str(&format!("#line 1 \"{name}\"\n{text}"));
        }
        unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::path::Path;

    /// The folder of kernels in a checkout.
    fn folder() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda")
    }

    #[test]
    fn every_kernel_file_is_embedded() {
        let mut files: Vec<String> = std::fs::read_dir(folder())
            .expect("the folder of kernels")
            .filter_map(|entry| {
                let path = entry.expect("an entry").path();
                let kernels = path.extension().is_some_and(|e| e == "cu");
                kernels.then(|| path.file_stem().expect("a name").to_string_lossy().into_owned())
            })
            .collect();
        files.sort();
        let mut embedded: Vec<&str> = SOURCES.iter().filter(|s| !s.is_bf16()).map(|s| s.name).collect();
        embedded.sort_unstable();
        assert_eq!(files, embedded);
        for source in SOURCES.iter().filter(|s| !s.is_bf16()) {
            let both =
                source.text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "real");
            let other = format!("{}_bf16", source.name);
            assert_eq!(both, SOURCES.iter().any(|s| s.name == other && s.is_bf16()), "{other}");
        }
    }

    #[test]
    fn the_listed_kernels_are_the_defined_ones() {
        // Kernels appear by name, or as the first argument of a macro that appends to it.
        for source in SOURCES {
            let mut defined: Vec<String> = Vec::new();
            // What only one of a file's units has stands between #ifdef or #ifndef and #endif.
            let mut left_out = false;
            for line in source.text.lines() {
                match line {
                    "#ifdef BF16" => left_out = !source.is_bf16(),
                    "#ifndef BF16" => left_out = source.is_bf16(),
                    "#endif" => left_out = false,
                    _ => {}
                }
                if left_out {
                    continue;
                }
                if let Some(name) = line.strip_prefix("UNARY(").and_then(|l| l.split(',').next()) {
                    defined.extend([format!("{name}_forward_f32"), format!("{name}_backward_f32")]);
                } else if let Some(name) = line.strip_prefix("BINARY(").and_then(|l| l.split(',').next()) {
                    defined.push(format!("{name}_forward_f32"));
                } else if let Some((name, _)) = line.split_once('(')
                    && (name.ends_with("_f32") || name.ends_with("_bf16"))
                    && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                {
                    defined.push(name.to_owned());
                }
            }
            if source.is_bf16() {
                defined = defined.iter().map(|name| name.replace("_f32", "_bf16")).collect();
            }
            defined.sort();
            assert_eq!(defined, source.kernels, "{}", source.name);
        }
    }

    #[test]
    fn units_are_self_contained_and_name_their_places() {
        for source in SOURCES {
            let unit = source.unit();
            assert!(!unit.contains("#include"), "{}", source.name);
            let own = unit.split_once(&format!("\n#line 1 \"{}\"\n", source.file)).expect("a #line").1;
            assert_eq!(own, source.text);
            let on_disk = std::fs::read_to_string(folder().join(source.file));
            assert_eq!(own, on_disk.expect("the file"));
        }
    }

    #[test]
    fn launches_ask_for_what_a_kernel_s_word_says() {
        assert_eq!(dynamic_bytes("attention64_forward_bf16"), 49152);
        assert_eq!(dynamic_bytes("attention_forward_f32"), 0);
        assert_eq!(dynamic_bytes("no_such_kernel"), 0);
    }

    #[test]
    fn kernels_are_found_by_name_and_named_once() {
        let all: Vec<&str> = SOURCES.iter().flat_map(|s| s.kernels).copied().collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert_eq!(of_kernel("gelu_backward_f32").map(|s| s.name), Some("elementwise"));
        assert!(of_kernel("gelu").is_none());
    }
}
