//! Two tiny language models in naive float64, whose only purpose is to feed a search in tests.
//!
//! Letters: T tokens, C width, H heads, D head width, F feed-forward width, V vocabulary.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use pyrformer_files::SafeTensors;
use serde_json::Value;

/// The fixtures' folder, or a printed reason why there is none.
pub(crate) fn fixtures() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures");
    if !path.is_dir() {
        eprintln!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[derive(Clone, Copy)]
enum Family {
    Gpt2,
    Llama,
}

/// What a prefix of tokens leaves behind: keys and values [layer][T][C], and the logits after it.
pub(crate) struct State {
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
    pub(crate) logits: Vec<f32>,
}

/// A model with every prefix it has seen.
pub(crate) struct Model {
    family: Family,
    weights: HashMap<String, Vec<f64>>,
    layers: usize,
    heads: usize,
    epsilon: f64,
    pub(crate) vocab_size: usize,
    seen: HashMap<Vec<u32>, Rc<State>>,
}

impl Model {
    pub(crate) fn load(directory: &Path) -> Self {
        let config = json(&directory.join("config.json"));
        let number = |names: [&str; 2]| {
            names
                .iter()
                .find_map(|n| config[n].as_f64())
                .unwrap_or_else(|| panic!("{names:?} is not configured"))
        };
        let files = SafeTensors::open_dir(directory).unwrap();
        let weights = files
            .names()
            .map(|n| {
                (n.to_owned(), files.get(n).unwrap().to_f32().unwrap().into_iter().map(f64::from).collect())
            })
            .collect();
        Self {
            family: if config["model_type"] == "gpt2" { Family::Gpt2 } else { Family::Llama },
            weights,
            layers: number(["n_layer", "num_hidden_layers"]) as usize,
            heads: number(["n_head", "num_attention_heads"]) as usize,
            epsilon: number(["layer_norm_epsilon", "rms_norm_eps"]),
            vocab_size: number(["vocab_size", "vocab_size"]) as usize,
            seen: HashMap::new(),
        }
    }

    /// The state after `ids`, computed one token at a time.
    pub(crate) fn after(&mut self, ids: &[u32]) -> Rc<State> {
        if let Some(state) = self.seen.get(ids) {
            return Rc::clone(state);
        }
        let (last, before) = ids.split_last().unwrap();
        let (mut keys, mut values) = (vec![vec![]; self.layers], vec![vec![]; self.layers]);
        if !before.is_empty() {
            let state = self.after(before);
            keys.clone_from(&state.keys);
            values.clone_from(&state.values);
        }
        let logits = match self.family {
            Family::Gpt2 => self.gpt2(*last, &mut keys, &mut values),
            Family::Llama => self.llama(*last, &mut keys, &mut values),
        };
        let state = Rc::new(State { keys, values, logits });
        self.seen.insert(ids.to_vec(), Rc::clone(&state));
        state
    }

    fn weight(&self, name: &str) -> &[f64] {
        self.weights.get(name).unwrap_or_else(|| panic!("no weight {name}"))
    }

    fn gpt2(&self, token: u32, keys: &mut [Vec<Vec<f64>>], values: &mut [Vec<Vec<f64>>]) -> Vec<f32> {
        let (wte, wpe) = (self.weight("transformer.wte.weight"), self.weight("transformer.wpe.weight"));
        let c = wte.len() / self.vocab_size;
        let (t, position) = (token as usize, keys[0].len());
        let mut x: Vec<f64> = (0..c).map(|i| wte[t * c + i] + wpe[position * c + i]).collect();
        for l in 0..self.layers {
            let w = |name: &str| self.weight(&format!("transformer.h.{l}.{name}"));
            // Weights are [in, out].
            let conv = |x: &[f64], name: &str| {
                let mut y = w(&format!("{name}.bias")).to_vec();
                let weight = w(&format!("{name}.weight"));
                for (row, x) in weight.chunks(y.len()).zip(x) {
                    y.iter_mut().zip(row).for_each(|(y, w)| *y += x * w);
                }
                y
            };
            let h = layer_norm(&x, w("ln_1.weight"), w("ln_1.bias"), self.epsilon);
            let qkv = conv(&h, "attn.c_attn");
            keys[l].push(qkv[c..2 * c].to_vec());
            values[l].push(qkv[2 * c..].to_vec());
            add(&mut x, &conv(&attend(&qkv[..c], &keys[l], &values[l], self.heads), "attn.c_proj"));
            let h = layer_norm(&x, w("ln_2.weight"), w("ln_2.bias"), self.epsilon);
            let mut h = conv(&h, "mlp.c_fc");
            let gelu = |x: f64| {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            };
            h.iter_mut().for_each(|x| *x = gelu(*x));
            add(&mut x, &conv(&h, "mlp.c_proj"));
        }
        let x = layer_norm(
            &x,
            self.weight("transformer.ln_f.weight"),
            self.weight("transformer.ln_f.bias"),
            self.epsilon,
        );
        matrix_vector(wte, &x).into_iter().map(|x| x as f32).collect()
    }

    fn llama(&self, token: u32, keys: &mut [Vec<Vec<f64>>], values: &mut [Vec<Vec<f64>>]) -> Vec<f32> {
        let embedding = self.weight("model.embed_tokens.weight");
        let c = embedding.len() / self.vocab_size;
        let (t, position) = (token as usize, keys[0].len());
        let mut x = embedding[t * c..][..c].to_vec();
        for l in 0..self.layers {
            let w = |name: &str| self.weight(&format!("model.layers.{l}.{name}.weight"));
            let h = rms_norm(&x, w("input_layernorm"), self.epsilon);
            let q = rotate(matrix_vector(w("self_attn.q_proj"), &h), self.heads, position);
            keys[l].push(rotate(matrix_vector(w("self_attn.k_proj"), &h), self.heads, position));
            values[l].push(matrix_vector(w("self_attn.v_proj"), &h));
            let h = attend(&q, &keys[l], &values[l], self.heads);
            add(&mut x, &matrix_vector(w("self_attn.o_proj"), &h));
            let h = rms_norm(&x, w("post_attention_layernorm"), self.epsilon);
            let (gate, up) = (matrix_vector(w("mlp.gate_proj"), &h), matrix_vector(w("mlp.up_proj"), &h));
            let h: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(&mut x, &matrix_vector(w("mlp.down_proj"), &h));
        }
        let x = rms_norm(&x, self.weight("model.norm.weight"), self.epsilon);
        matrix_vector(self.weight("lm_head.weight"), &x).into_iter().map(|x| x as f32).collect()
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `weight` [out, in] times `x` [in].
fn matrix_vector(weight: &[f64], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], epsilon: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let scale = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + epsilon).sqrt();
    x.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) * scale * w + b).collect()
}

fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + epsilon).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// One query [H·D] over all keys and values [T][H·D].
fn attend(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], heads: usize) -> Vec<f64> {
    let d = q.len() / heads;
    let mut out = vec![0.0; q.len()];
    for h in 0..heads {
        let span = h * d..(h + 1) * d;
        let dot =
            |k: &Vec<f64>| q[span.clone()].iter().zip(&k[span.clone()]).map(|(q, k)| q * k).sum::<f64>();
        let scores: Vec<f64> = keys.iter().map(|k| dot(k) / (d as f64).sqrt()).collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (weight, v) in weights.iter().zip(values) {
            out[span.clone()].iter_mut().zip(&v[span.clone()]).for_each(|(o, v)| *o += weight / total * v);
        }
    }
    out
}

/// Rotary positions by halves, base 10000.
fn rotate(mut x: Vec<f64>, heads: usize, position: usize) -> Vec<f64> {
    let d = x.len() / heads;
    for head in x.chunks_mut(d) {
        let (low, high) = head.split_at_mut(d / 2);
        for (i, (a, b)) in low.iter_mut().zip(high).enumerate() {
            let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / d as f64);
            (*a, *b) = (*a * angle.cos() - *b * angle.sin(), *b * angle.cos() + *a * angle.sin());
        }
    }
    x
}
