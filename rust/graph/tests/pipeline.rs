//! The way from a graph to a plan, on a small network: what each pass leaves, what lowering does with views and states.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use pyrformer_graph::autodiff::gradients;
use pyrformer_graph::op::{AttentionSpec, DropoutSpec};
use pyrformer_graph::{
    Binary, DType, Epilogue, Error, Graph, LossSpec, Op, Plan, Space, Target, TensorType, Unary, ValueId,
    lower, passes, verify::verify,
};

struct NoScratch;

impl Target for NoScratch {
    fn scratch_bytes(&self, _: &Op, _: &[&TensorType], _: &[&TensorType]) -> usize {
        0
    }
}

fn f32(shape: &[usize]) -> TensorType {
    TensorType::new(DType::F32, pyrformer_graph::Shape(shape.to_vec()))
}

fn matmul(tb: bool) -> Op {
    Op::MatMul { ta: false, tb, epilogue: Epilogue::default() }
}

/// A block with a residual, a loss, and the step that lowers it.
fn training_graph() -> Graph {
    let mut g = Graph::new();
    let x = g.input("x", f32(&[6, 4])).unwrap();
    let labels = g.input("labels", TensorType::new(DType::I32, [6])).unwrap();
    let w = g.state("w", f32(&[8, 4])).unwrap();
    let b = g.state("b", f32(&[8])).unwrap();
    let v = g.state("v", f32(&[4, 8])).unwrap();
    g.set_scope("mlp");
    let h = g.add1(matmul(true), &[x, w]).unwrap();
    let h = g.add1(Op::Binary(Binary::Add), &[h, b]).unwrap();
    let a = g.add1(Op::Unary(Unary::Gelu), &[h]).unwrap();
    let y = g.add1(matmul(true), &[a, v]).unwrap();
    let y = g.add1(Op::Binary(Binary::Add), &[x, y]).unwrap();
    g.set_scope("head");
    let loss = g.add1(Op::LinearCrossEntropy(LossSpec::default()), &[y, w, labels]).unwrap();
    let mean = g.add1(Op::Unary(Unary::Scale(0.25)), &[loss]).unwrap();
    let grads = gradients(&mut g, mean, &[w, b, v]).unwrap();
    g.output("loss", mean).unwrap();
    for (state, grad) in [w, b, v].into_iter().zip(grads) {
        let down = g.add1(Op::Unary(Unary::Scale(-0.1)), &[grad]).unwrap();
        let new = g.add1(Op::Binary(Binary::Add), &[state, down]).unwrap();
        g.update(state, new).unwrap();
    }
    g
}

#[test]
fn the_printed_form_after_all_passes() {
    let g = passes::optimise(&training_graph()).unwrap();
    let expected = r#"%0 = input{"x"} : f32[6,4]
%1 = input{"labels"} : i32[6]
%2 = state{"w"} : f32[8,4]
%3 = state{"b"} : f32[8]
%4 = state{"v"} : f32[4,8]
%5, %6 = matmul{tb, bias, gelu+pre} %0, %2, %3 : f32[6,8], f32[6,8]  # mlp
%7 = matmul{tb, residual} %5, %4, %0 : f32[6,4]  # mlp
%8 = fill{0.25} : f32[]  # head
%9, %10, %11 = linear_cross_entropy_grad %7, %2, %1, %8 : f32[], f32[6,4], f32[8,4]  # head
%12 = scale{0.25} %9 : f32[]  # head
%13 = matmul{ta} %10, %5 : f32[4,8]  # mlp
%14 = matmul{gelu'} %10, %4, %6 : f32[6,8]  # mlp
%15 = sum_to %14 : f32[8]  # mlp
%16 = matmul{ta, residual} %14, %0, %11 : f32[8,4]  # mlp
%17 = scale{-0.1} %16 : f32[8,4]
%18 = add %2, %17 : f32[8,4]
%19 = scale{-0.1} %15 : f32[8]
%20 = add %3, %19 : f32[8]
%21 = scale{-0.1} %13 : f32[4,8]
%22 = add %4, %21 : f32[4,8]
output "loss" = %12
update "w" <- %18
update "b" <- %20
update "v" <- %22
"#;
    assert_eq!(g.to_string(), expected);
}

fn plan(g: &Graph) -> Plan {
    lower(&passes::optimise(g).unwrap(), &NoScratch).unwrap()
}

#[test]
fn every_pass_leaves_a_legal_graph() {
    let mut g = training_graph();
    verify(&g).unwrap();
    for (name, pass) in passes::PIPELINE {
        g = pass(&g).unwrap();
        verify(&g).unwrap_or_else(|e| panic!("after {name}: {e}"));
    }
}

#[test]
fn states_are_updated_in_place_and_plans_survive_serialisation() {
    let p = plan(&training_graph());
    assert!(p.states.iter().all(|s| s.updated));
    let onto_state: Vec<_> = p
        .steps
        .iter()
        .filter(|s| matches!(s.outputs[0].space, Space::State(_)))
        .map(|s| s.op.name())
        .collect();
    assert_eq!(onto_state, ["add", "add", "add"]);
    assert!(p.steps.iter().all(|s| s.op != Op::Copy));
    assert_eq!(serde_json::from_str::<Plan>(&p.to_json().unwrap()).unwrap(), p);
    assert_eq!(p.state_bytes(), (32 + 8 + 32) * 4);
    assert!(p.flops() > 0 && p.arena_bytes >= p.live_bytes && p.table().len() == p.steps.len());
}

#[test]
fn a_state_read_after_its_update_is_copied_at_the_end() {
    let mut g = Graph::new();
    let s = g.state("s", f32(&[4])).unwrap();
    let x = g.input("x", f32(&[4])).unwrap();
    let new = g.sum(s, x).unwrap();
    g.update(s, new).unwrap();
    let late = g.add1(Op::Binary(Binary::Mul), &[new, s]).unwrap();
    g.output("late", late).unwrap();
    let p = plan(&g);
    assert_eq!(p.steps.last().unwrap().op, Op::Copy);
    assert!(matches!(p.steps.last().unwrap().outputs[0].space, Space::State(0)));
}

#[test]
fn split_and_concat_are_views() {
    let mut g = Graph::new();
    let x = g.input("x", f32(&[2, 5, 12])).unwrap();
    let y = g.add1(Op::Unary(Unary::Tanh), &[x]).unwrap();
    let parts = g.add(Op::Split { sizes: vec![4, 4, 4] }, &[y]).unwrap();
    let spec = AttentionSpec {
        heads: 2,
        kv_heads: 2,
        causal: true,
        window: None,
        scale: 1.0,
        segments: false,
        key_bias: false,
        prefix: false,
        dropout: None,
    };
    let out = g.add(Op::Attention(spec), &parts).unwrap()[0];
    let a = g.add1(Op::Unary(Unary::Exp), &[out]).unwrap();
    let b = g.add1(Op::Unary(Unary::Relu), &[out]).unwrap();
    let joined = g.add1(Op::Concat, &[a, b]).unwrap();
    g.output("y", joined).unwrap();
    let p = plan(&g);
    let names: Vec<&str> = p.steps.iter().map(|s| s.op.name()).collect();
    assert_eq!(names, ["tanh", "attention", "exp", "relu"]);
    let qkv = &p.steps[1].inputs;
    assert_eq!((qkv[1].offset - qkv[0].offset, qkv[1].row_stride), (16, 12));
    let (exp, relu) = (&p.steps[2].outputs[0], &p.steps[3].outputs[0]);
    assert_eq!((relu.offset - exp.offset, exp.row_stride), (16, 8));
}

#[test]
fn wrong_operands_are_refused_with_their_types() {
    let mut g = Graph::new();
    let a = g.input("a", f32(&[2, 3])).unwrap();
    let b = g.input("b", f32(&[4, 5])).unwrap();
    let i = g.input("i", TensorType::new(DType::I32, [2])).unwrap();
    let message = |r: Result<Vec<ValueId>, Error>| r.unwrap_err().to_string();
    assert_eq!(
        message(g.add(matmul(false), &[a, b])),
        "[matmul] expected a [.., K], b [K, N], got f32[2,3], f32[4,5]"
    );
    assert_eq!(message(g.add(Op::Unary(Unary::Exp), &[i])), "[exp] operand 0 must be a float type, got i32");
    let dropout = Op::Dropout(DropoutSpec { p: 1.0, stream: 0 });
    let rng = g.input("rng", TensorType::new(DType::I32, [4])).unwrap();
    assert!(message(g.add(dropout.clone(), &[a, rng])).contains("in [0, 1), got 1"));
    assert!(message(g.add(dropout, &[a, rng, b])).contains("residual [..], got f32[2,3], i32[4], f32[4,5]"));
    assert!(g.input("a", f32(&[1])).unwrap_err().to_string().contains("two inputs or states called \"a\""));
    assert_eq!(g.nodes().len(), 4, "a refused operation leaves nothing behind");
}

#[test]
fn dropout_takes_the_residual_that_nobody_else_adds_to_it() {
    let mut g = Graph::new();
    let [x, r] = ["x", "r"].map(|n| g.input(n, f32(&[3, 4])).unwrap());
    let row = g.input("row", f32(&[4])).unwrap();
    let sum = g.state("sum", f32(&[3, 4])).unwrap();
    let rng = g.input("rng", TensorType::new(DType::I32, [4])).unwrap();
    let mut dropout = |stream| g.add1(Op::Dropout(DropoutSpec { p: 0.5, stream }), &[x, rng]).unwrap();
    let [a, b, twice, repeated, summed] = [0, 1, 2, 3, 4].map(&mut dropout);
    let add = Op::Binary(Binary::Add);
    // Of two that are added to each other the first takes the second; a sum that outlives the run is a step of its own.
    for (name, left, right) in [("one", a, b), ("two", twice, r), ("three", twice, x), ("row", repeated, row)]
    {
        let y = g.add1(add.clone(), &[left, right]).unwrap();
        g.output(name, y).unwrap();
    }
    let y = g.add1(add, &[sum, summed]).unwrap();
    g.update(sum, y).unwrap();
    let g = passes::narrow(&passes::optimise(&g).unwrap(), DType::Bf16).unwrap();
    verify(&g).unwrap();
    let p = lower(&g, &NoScratch).unwrap();
    let steps: Vec<(&str, usize)> = p.steps.iter().map(|s| (s.op.name(), s.inputs.len())).collect();
    let (alone, add) = (("dropout", 2), ("add", 2));
    assert_eq!(steps, [alone, alone, alone, alone, add, ("dropout", 3), add, add, add]);
    assert_eq!(p.steps[5].cost.flops, 2 * 12);
}

#[test]
fn a_training_step_in_bfloat16_keeps_its_sums_and_masters_in_float32() {
    let g = passes::narrow(&passes::optimise(&training_graph()).unwrap(), DType::Bf16).unwrap();
    verify(&g).unwrap();
    let expected = r#"%0 = input{"x"} : f32[6,4]
%1 = input{"labels"} : i32[6]
%2 = state{"w"} : f32[8,4]
%3 = state{"b"} : f32[8]
%4 = state{"v"} : f32[4,8]
%5 = cast %0 : bf16[6,4]  # mlp
%6 = cast %2 : bf16[8,4]  # mlp
%7 = cast %3 : bf16[8]  # mlp
%8, %9 = matmul{tb, bias, gelu+pre} %5, %6, %7 : bf16[6,8], bf16[6,8]  # mlp
%10 = cast %4 : bf16[4,8]  # mlp
%11 = matmul{tb, residual} %8, %10, %5 : bf16[6,4]  # mlp
%12 = fill{0.25} : f32[]  # head
%13, %14, %15 = linear_cross_entropy_grad %11, %6, %1, %12 : f32[], bf16[6,4], f32[8,4]  # head
%16 = scale{0.25} %13 : f32[]  # head
%17 = matmul{ta} %14, %8 : f32[4,8]  # mlp
%18 = matmul{gelu'} %14, %10, %9 : bf16[6,8]  # mlp
%19 = sum_to %18 : f32[8]  # mlp
%20 = matmul{ta, residual} %18, %5, %15 : f32[8,4]  # mlp
%21 = scale{-0.1} %20 : f32[8,4]
%22 = add %2, %21 : f32[8,4]
%23 = scale{-0.1} %19 : f32[8]
%24 = add %3, %23 : f32[8]
%25 = scale{-0.1} %17 : f32[4,8]
%26 = add %4, %25 : f32[4,8]
output "loss" = %16
update "w" <- %22
update "b" <- %24
update "v" <- %26
"#;
    assert_eq!(g.to_string(), expected);
    assert!(plan(&g).arena_bytes < plan(&training_graph()).arena_bytes);
}

#[test]
fn heads_that_tensor_cores_do_not_take_are_computed_in_float32() {
    for (width, half, taken) in [
        (256, DType::Bf16, true),
        (264, DType::Bf16, false),
        (128, DType::F16, true),
        (136, DType::F16, false),
        (36, DType::F16, false),
    ] {
        let mut g = Graph::new();
        let x = g.input("x", f32(&[1, 4, width])).unwrap();
        let spec = AttentionSpec {
            heads: 1,
            kv_heads: 1,
            causal: true,
            window: None,
            scale: 1.0,
            segments: false,
            key_bias: false,
            prefix: false,
            dropout: None,
        };
        let out = g.add(Op::Attention(spec), &[x, x, x]).unwrap()[0];
        g.output("out", out).unwrap();
        let g = passes::narrow(&g, half).unwrap();
        let node = g.nodes().iter().find(|n| matches!(n.op, Op::Attention(_))).unwrap();
        let dtype = if taken { half } else { DType::F32 };
        assert_eq!(g.ty(node.inputs[0]).dtype, dtype, "{width} columns in {half}");
    }
}

#[test]
fn a_weight_that_is_only_read_is_a_state_in_the_narrow_type() {
    let mut g = Graph::new();
    let ids = g.input("ids", TensorType::new(DType::I32, [2])).unwrap();
    let table = g.state("table", f32(&[5, 4])).unwrap();
    let (w, norm) = (g.state("w", f32(&[3, 4])).unwrap(), g.state("norm", f32(&[4])).unwrap());
    let x = g.add1(Op::Gather, &[table, ids]).unwrap();
    let y = g.add(Op::LayerNorm { eps: 1e-5, center: false }, &[x, norm]).unwrap()[0];
    let logits = g.add1(matmul(true), &[y, w]).unwrap();
    let more = g.add1(matmul(true), &[y, table]).unwrap();
    let rest = g.add1(Op::Unary(Unary::Tanh), &[more]).unwrap();
    for (name, v) in [("y", y), ("logits", logits), ("rest", rest)] {
        g.output(name, v).unwrap();
    }
    let expected = r#"%0 = input{"ids"} : i32[2]
%1 = state{"table@bf16"} : bf16[5,4]
%2 = state{"w@bf16"} : bf16[3,4]
%3 = state{"norm"} : f32[4]
%4 = gather %1, %0 : bf16[2,4]
%5, %6, %7 = rms_norm{eps=1e-5} %4, %3 : bf16[2,4], f32[2], f32[2]
%8 = cast %5 : f32[2,4]
%9 = matmul{tb} %5, %2 : f32[2,3]
%10 = matmul{tb} %5, %1 : bf16[2,5]
%11 = cast %10 : f32[2,5]
%12 = tanh %11 : f32[2,5]
output "y" = %8
output "logits" = %9
output "rest" = %12
"#;
    for half in [DType::Bf16, DType::F16] {
        let narrow = passes::narrow(&g, half).unwrap();
        verify(&narrow).unwrap();
        assert_eq!(narrow.to_string(), expected.replace("bf16", &half.to_string()));
    }
    assert!(passes::narrow(&g, DType::F64).is_err());
}

#[test]
fn adamw_writes_the_copy_that_products_read() {
    let mut g = Graph::new();
    let x = g.input("x", f32(&[6, 4])).unwrap();
    let [w, m, v] = ["w", "m", "v"].map(|n| g.state(n, f32(&[4, 4])).unwrap());
    let y = g.add1(matmul(true), &[x, w]).unwrap();
    let loss = g.add_as(Op::SumTo, &[y], f32(&[])).unwrap();
    let grad = gradients(&mut g, loss, &[w]).unwrap()[0];
    let [clip, lr] = ["clip", "lr"].map(|n| g.input(n, f32(&[])).unwrap());
    let step = g.input("step", TensorType::new(DType::I32, [])).unwrap();
    let op = Op::AdamW { beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, rounding: None };
    let new = g.add(op, &[w, grad, m, v, clip, lr, step]).unwrap();
    for (state, value) in [w, m, v].into_iter().zip(new) {
        g.update(state, value).unwrap();
    }
    g.output("loss", loss).unwrap();
    let optimised = passes::optimise(&g).unwrap();
    for half in [DType::Bf16, DType::F16] {
        let copy = format!("w@{half}");
        let g = passes::narrow(&optimised, half).unwrap();
        verify(&g).unwrap();
        let p = lower(&g, &NoScratch).unwrap();
        let states: Vec<(&str, DType, bool)> =
            p.states.iter().map(|s| (&s.name[..], s.ty.dtype, s.updated)).collect();
        let wide = ["w", "m", "v"].map(|n| (n, DType::F32, true));
        assert_eq!(states, [wide[0], (&copy[..], half, true), wide[1], wide[2]]);
        let product = p.steps.iter().find(|s| matches!(s.op, Op::MatMul { .. })).unwrap();
        assert_eq!(product.inputs[1].space, Space::State(1));
        let adamw = p.steps.iter().find(|s| matches!(s.op, Op::AdamW { .. })).unwrap();
        let spaces: Vec<Space> = adamw.outputs.iter().map(|o| o.space).collect();
        assert_eq!(spaces, [0, 2, 3, 1].map(Space::State));
        assert_eq!(adamw.cost.bytes, 16 * (7 * 4 + 2) + 12);
        assert!(p.steps.iter().all(|s| s.op != Op::Copy));
    }
}

#[test]
fn a_weight_that_is_rounded_by_chance_is_kept_in_bfloat16_alone() {
    let mut g = Graph::new();
    let x = g.input("x", f32(&[6, 4])).unwrap();
    let rng = g.input("rng", TensorType::new(DType::I32, [4])).unwrap();
    let [clip, lr] = ["clip", "lr"].map(|n| g.input(n, f32(&[])).unwrap());
    let step = g.input("step", TensorType::new(DType::I32, [])).unwrap();
    // One that a product reads, one that a norm reads, and a matrix and a vector that are updated only.
    let shapes = [("w", vec![4, 4]), ("norm", vec![4]), ("table", vec![5, 4]), ("bias", vec![4])];
    let weights: Vec<_> = shapes.iter().map(|(n, dims)| g.state(n, f32(dims)).unwrap()).collect();
    let y = g.add1(matmul(true), &[x, weights[0]]).unwrap();
    let y = g.add(Op::LayerNorm { eps: 1e-5, center: false }, &[y, weights[1]]).unwrap()[0];
    let loss = g.add_as(Op::SumTo, &[y], f32(&[])).unwrap();
    let grads = gradients(&mut g, loss, &weights[..2]).unwrap();
    let average = g.state("average", f32(&[4, 4])).unwrap();
    for (i, (name, dims)) in shapes.iter().enumerate() {
        let ty = f32(dims);
        let [m, v] = ["m", "v"].map(|kind| g.state(&format!("{kind}.{name}"), ty.clone()).unwrap());
        let grad = if i < 2 { grads[i] } else { g.input(&format!("g.{name}"), ty).unwrap() };
        let op = Op::AdamW { beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, rounding: Some(i as u32) };
        let new = g.add(op, &[weights[i], grad, m, v, clip, lr, step, rng]).unwrap();
        for (state, value) in [weights[i], m, v].into_iter().zip(&new) {
            g.update(state, *value).unwrap();
        }
        if i == 0 {
            let mean = g.add1(Op::Binary(Binary::Add), &[average, new[0]]).unwrap();
            g.update(average, mean).unwrap();
        }
    }
    g.output("loss", loss).unwrap();
    let g = passes::narrow(&passes::optimise(&g).unwrap(), DType::Bf16).unwrap();
    verify(&g).unwrap();
    let p = lower(&g, &NoScratch).unwrap();
    let dtype = |name: &str| p.states.iter().find(|s| s.name == name).map(|s| s.ty.dtype);
    for (name, wanted) in
        [("w", DType::Bf16), ("table", DType::Bf16), ("norm", DType::F32), ("bias", DType::F32)]
    {
        assert_eq!(dtype(name), Some(wanted), "{name}");
        assert_eq!(dtype(&format!("{name}@bf16")), None, "{name}");
        assert_eq!(dtype(&format!("m.{name}")), Some(DType::F32), "{name}");
    }
    assert_eq!(dtype("average"), Some(DType::F32));
    assert!(p.steps.iter().all(|s| s.op != Op::Copy));
    // Each updates its weight where it is.
    for s in p.steps.iter().filter(|s| matches!(s.op, Op::AdamW { .. })) {
        assert_eq!(s.inputs[0], s.outputs[0]);
    }
}
