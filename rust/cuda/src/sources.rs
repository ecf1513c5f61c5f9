//! The kernel files, each as self-contained translation units.
//!
//! A unit is `common.cuh`, the header that some files share, then the file, joined by `#line` directives so that compiler
//! messages name the places that people edit. Nothing is included by name: binaries are kept by the text that they were
//! made of, so an edited header behind an `#include` would load a stale one. A file whose kernels take tensors of several
//! types makes a unit for each; in those of 16-bit floats, `BF16` or `F16` is defined and each kernel is renamed.

use std::sync::LazyLock;

/// The text in front of every unit.
const COMMON: &str = include_str!("../../../cuda/common.cuh");

/// What the files of attention share.
const ATTENTION: &str = include_str!("../../../cuda/attention.cuh");

/// What the files of attention on tensor cores share.
const TENSOR: &str = include_str!("../../../cuda/tensor.cuh");

/// What the files share that compute by tiles in float32.
const TILES: &str = include_str!("../../../cuda/tiles.cuh");

/// Registers and shared memory of each kernel by architecture, as TOML: what estimates of occupancy start from.
pub const BARS: &str = include_str!("../../../cuda/bars.toml");

/// What tensors are stored in, as names of kernels and units end: all types, and those of one family of kernels.
const ALL: &[&str] = &["f32", "bf16", "f16"];
const WIDE: &[&str] = &["f32"];
const HALVES: &[&str] = &["bf16", "f16"];
const BRAIN: &[&str] = &["bf16"];

/// One translation unit.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its name: that of its file without extension, `loss`, and `loss_bf16` for tensors of bfloat16.
    pub name: String,
    /// The `extern "C"` kernels it defines.
    pub kernels: Vec<String>,
    /// The only target it is for, as in `sm_90a`, where its kernels take the place of those of the same names; else empty.
    pub only: &'static str,
    file: &'static File,
    of: &'static str,
}

/// A file of kernels, which are named here without their types.
#[derive(Debug)]
struct File {
    name: &'static str,
    text: &'static str,
    /// The only target that it is for, or empty.
    only: &'static str,
    /// Kernels, and the types of tensors that they are there for.
    kernels: &'static [(&'static [&'static str], &'static [&'static str])],
}

/// All files, by name. One that is for a single target comes behind those whose kernels it has.
const FILES: &[File] = &[
    File {
        name: "attention",
        text: include_str!("../../../cuda/attention.cu"),
        only: "",
        kernels: &[(
            WIDE,
            &[
                "attention_delta_backward",
                "attention_dkv_backward",
                "attention_dq_backward",
                "attention_forward",
            ],
        )],
    },
    File {
        name: "attention_mma",
        text: include_str!("../../../cuda/attention_mma.cu"),
        only: "",
        kernels: &[
            (
                HALVES,
                &[
                    "attention128_dkv_backward",
                    "attention128_dq_backward",
                    "attention128_forward",
                    "attention64_dkv_backward",
                    "attention64_dq_backward",
                    "attention64_forward",
                    "attention_delta_backward",
                ],
            ),
            (BRAIN, &["attention256_dkv_backward", "attention256_dq_backward", "attention256_forward"]),
        ],
    },
    File {
        name: "attention_wgmma",
        text: include_str!("../../../cuda/attention_wgmma.cu"),
        only: "sm_90a",
        kernels: &[(
            BRAIN,
            &[
                "attention128_dkv_backward",
                "attention128_dq_backward",
                "attention128_forward",
                "attention256_dkv_backward",
                "attention256_dq_backward",
                "attention256_forward",
                "attention64_dkv_backward",
                "attention64_dq_backward",
                "attention64_forward",
            ],
        )],
    },
    File {
        name: "best",
        text: include_str!("../../../cuda/best.cu"),
        only: "",
        kernels: &[(WIDE, &["best_forward"])],
    },
    File {
        name: "cache",
        text: include_str!("../../../cuda/cache.cu"),
        only: "",
        kernels: &[(
            ALL,
            &["cache_write_forward", "cached_attention_forward", "cached_attention_join_forward"],
        )],
    },
    File {
        name: "elementwise",
        text: include_str!("../../../cuda/elementwise.cu"),
        only: "",
        kernels: &[
            (
                ALL,
                &[
                    "add_forward",
                    "broadcast_forward",
                    "div_forward",
                    "dropout_forward",
                    "epilogue_forward",
                    "exp_backward",
                    "exp_forward",
                    "fill_forward",
                    "gated_backward",
                    "gated_forward",
                    "gelu_backward",
                    "gelu_forward",
                    "gelu_tanh_backward",
                    "gelu_tanh_forward",
                    "mish_backward",
                    "mish_forward",
                    "mul_forward",
                    "quick_gelu_backward",
                    "quick_gelu_forward",
                    "relu2_backward",
                    "relu2_forward",
                    "relu_backward",
                    "relu_forward",
                    "scale_forward",
                    "sigmoid_backward",
                    "sigmoid_forward",
                    "sign_backward",
                    "sign_forward",
                    "silu_backward",
                    "silu_forward",
                    "sqrt_backward",
                    "sqrt_forward",
                    "sub_forward",
                    "tanh_backward",
                    "tanh_forward",
                ],
            ),
            (HALVES, &["narrow_forward", "widen_forward"]),
        ],
    },
    File {
        name: "loss",
        text: include_str!("../../../cuda/loss.cu"),
        only: "",
        kernels: &[(ALL, &["cross_entropy_backward", "cross_entropy_forward"])],
    },
    File {
        name: "norm",
        text: include_str!("../../../cuda/norm.cu"),
        only: "",
        kernels: &[(ALL, &["layer_norm_backward", "layer_norm_forward"])],
    },
    File {
        name: "optimizer",
        text: include_str!("../../../cuda/optimizer.cu"),
        only: "",
        kernels: &[(ALL, &["adamw_forward", "adamw_rounded_forward"])],
    },
    File {
        name: "positions",
        text: include_str!("../../../cuda/positions.cu"),
        only: "",
        kernels: &[
            (ALL, &["rope_forward"]),
            (WIDE, &["alibi_bias_forward", "iota_forward", "rope_table_forward"]),
        ],
    },
    File {
        name: "reduce",
        text: include_str!("../../../cuda/reduce.cu"),
        only: "",
        kernels: &[
            (ALL, &["sum_forward", "sum_to_forward"]),
            (WIDE, &["clip_factor_forward", "global_norm_forward", "global_norm_parts_forward"]),
        ],
    },
    File {
        name: "relative",
        text: include_str!("../../../cuda/relative.cu"),
        only: "",
        kernels: &[(
            WIDE,
            &[
                "relative_attention_dkinds_backward",
                "relative_attention_dkv_backward",
                "relative_attention_dq_backward",
                "relative_attention_dr_backward",
                "relative_attention_forward",
            ],
        )],
    },
    File {
        name: "rows",
        text: include_str!("../../../cuda/rows.cu"),
        only: "",
        kernels: &[
            (ALL, &["gather_forward", "scatter_add_forward"]),
            (WIDE, &["count_labels_forward"]),
            (HALVES, &["gather_narrow_forward"]),
        ],
    },
];

/// All units, in the order of files and types.
pub static SOURCES: LazyLock<Vec<Source>> =
    LazyLock::new(|| FILES.iter().flat_map(|file| ALL.iter().filter_map(|of| file.unit(of))).collect());

/// The unit that defines `kernel`.
#[must_use]
pub fn of_kernel(kernel: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|s| s.only.is_empty() && s.kernels.iter().any(|k| k == kernel))
}

/// Bytes of shared memory that launches of `kernel` ask for, beside what it declares; of the one that is `only` for a target,
/// where that is not empty.
#[must_use]
pub fn dynamic_bytes(kernel: &str, only: &str) -> usize {
    let head = if only.is_empty() { format!("[{kernel}]\n") } else { format!("[{only}.{kernel}]\n") };
    let bars = BARS.split_once(&head).map_or("", |(_, rest)| rest);
    let line =
        bars.lines().take_while(|l| !l.starts_with('[')).find_map(|l| l.strip_prefix("dynamic_bytes = "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

impl File {
    /// The unit for tensors of a type, where it has kernels for them.
    fn unit(&'static self, of: &'static str) -> Option<Source> {
        let stems =
            self.kernels.iter().filter(|(types, _)| types.contains(&of)).flat_map(|(_, stems)| *stems);
        let mut kernels: Vec<String> = stems.map(|stem| format!("{stem}_{of}")).collect();
        kernels.sort();
        let name = if of == "f32" { self.name.to_owned() } else { format!("{}_{of}", self.name) };
        (!kernels.is_empty()).then_some(Source { name, kernels, only: self.only, file: self, of })
    }
}

impl Source {
    /// The text to hand to NVRTC. It includes nothing.
    #[must_use]
    pub fn unit(&self) -> String {
        let mut unit = String::new();
        if self.of != "f32" {
            unit.push_str(&format!("#define {}\n", self.of.to_uppercase()));
            for kernel in &self.kernels {
                let stem = kernel.strip_suffix(self.of).unwrap_or(kernel);
                unit.push_str(&format!("#define {stem}f32 {kernel}\n"));
            }
        }
        let file = self.file.name;
        let masks = file.starts_with("attention") || file == "relative";
        let tiles = matches!(file, "attention" | "relative");
        let heads = [
            ("common.cuh", COMMON, true),
            ("attention.cuh", ATTENTION, masks),
            ("tensor.cuh", TENSOR, file.starts_with("attention_")),
            ("tiles.cuh", TILES, tiles),
        ];
        let own = format!("{file}.cu");
        for (name, text, _) in
            heads.into_iter().chain([(&own[..], self.file.text, true)]).filter(|part| part.2)
        {
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
        assert_eq!(files, FILES.iter().map(|f| f.name).collect::<Vec<_>>());
        for file in FILES {
            let words = file.text.split(|c: char| !c.is_alphanumeric() && c != '_');
            let typed = words.into_iter().any(|word| word == "real");
            assert_eq!(
                typed,
                SOURCES.iter().any(|s| s.file.name == file.name && s.of != "f32"),
                "{}",
                file.name
            );
        }
    }

    #[test]
    fn the_listed_kernels_are_the_defined_ones() {
        // Kernels appear by name, or as the first argument of a macro that appends to it.
        for source in SOURCES.iter() {
            let half = source.of != "f32";
            let mut defined: Vec<String> = Vec::new();
            // What only one of a file's units has stands between #ifdef or #ifndef and #endif.
            let mut left_out = false;
            for line in source.file.text.lines() {
                match line {
                    "#ifdef HALF" => left_out = !half,
                    "#ifndef HALF" => left_out = half,
                    "#ifndef F16" => left_out = source.of == "f16",
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
                    && name.ends_with("_f32")
                    && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                {
                    defined.push(name.to_owned());
                }
            }
            let ending = format!("_{}", source.of);
            defined = defined.iter().map(|name| name.replace("_f32", &ending)).collect();
            defined.sort();
            assert_eq!(defined, source.kernels, "{}", source.name);
        }
    }

    #[test]
    fn units_are_self_contained_and_name_their_places() {
        for source in SOURCES.iter() {
            let (unit, file) = (source.unit(), format!("{}.cu", source.file.name));
            assert!(!unit.contains("#include"), "{}", source.name);
            let own = unit.split_once(&format!("\n#line 1 \"{file}\"\n")).expect("a #line").1;
            assert_eq!(own, source.file.text);
            let on_disk = std::fs::read_to_string(folder().join(file));
            assert_eq!(own, on_disk.expect("the file"));
        }
    }

    #[test]
    fn launches_ask_for_what_a_kernel_s_word_says() {
        assert_eq!(dynamic_bytes("attention256_dq_backward_bf16", ""), 98304);
        assert_eq!(dynamic_bytes("attention256_dq_backward_bf16", "sm_90a"), 196_608);
        assert_eq!(dynamic_bytes("attention_forward_f32", ""), 0);
        assert_eq!(dynamic_bytes("no_such_kernel", ""), 0);
    }

    #[test]
    fn kernels_are_found_by_name_and_named_once() {
        let of = |only: &str| -> Vec<&str> {
            SOURCES.iter().filter(|s| s.only == only).flat_map(|s| &s.kernels).map(String::as_str).collect()
        };
        let all = of("");
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert!(of("sm_90a").iter().all(|kernel| all.contains(kernel)));
        assert_eq!(of_kernel("attention64_forward_bf16").map(|s| s.only), Some(""));
        assert_eq!(of_kernel("gelu_backward_f32").map(|s| &s.name[..]), Some("elementwise"));
        assert!(of_kernel("gelu").is_none());
    }
}
