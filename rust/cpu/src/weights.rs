//! Which states of a plan can be kept in another form than row by row: packed, or in 8 bits.

use pyrformer_graph::{DType, Op, Operand, Plan, Space, Step};

/// How a plan uses a state that can be kept in another form: whether it multiplies by it as `[N, K]` or `[K, N]`; None within,
/// if it takes rows of it only. None for states that a step writes, or reads in another way or in part.
pub(crate) fn uses(plan: &Plan, state: usize) -> Option<Option<bool>> {
    let declared = &plan.states[state].ty;
    if declared.dtype != DType::F32 || declared.shape.0.len() != 2 {
        return None;
    }
    let this = |o: &Operand| o.space == Space::State(state);
    let whole = |o: &Operand| o.offset == 0 && o.ty.shape == declared.shape && o.is_contiguous();
    if plan.steps.iter().any(|s| s.outputs.iter().any(this)) || plan.outputs.iter().any(|p| this(&p.operand))
    {
        return None;
    }
    let mut found = None;
    for step in &plan.steps {
        for (number, operand) in step.inputs.iter().enumerate().filter(|(_, o)| this(o)) {
            match reads(step, number) {
                Some(Read::Rows) if whole(operand) => {}
                Some(Read::Factor { transposed })
                    if whole(operand) && found.unwrap_or(transposed) == transposed =>
                {
                    found = Some(transposed);
                }
                _ => return None,
            }
        }
    }
    Some(found)
}

/// How a step reads an operand.
enum Read {
    Rows,
    Factor { transposed: bool },
}

fn reads(step: &Step, operand: usize) -> Option<Read> {
    match (&step.op, operand) {
        (Op::Gather, 0) => Some(Read::Rows),
        (Op::MatMul { ta: false, tb, .. }, 1) => Some(Read::Factor { transposed: *tb }),
        (Op::LinearCrossEntropy(_) | Op::LinearTokenLosses { .. }, 1) => {
            Some(Read::Factor { transposed: true })
        }
        _ => None,
    }
}

/// How a plan uses a state that can be a cache of 8 bits, of float32: over how many heads of keys or values it attends;
/// None within, if it only writes tokens to it. None for states that it uses in another way.
pub(crate) fn cached(plan: &Plan, state: usize) -> Option<Option<usize>> {
    if plan.states[state].ty.dtype != DType::F32 || plan.states[state].ty.shape.0.len() != 3 {
        return None;
    }
    let this = |o: &Operand| o.space == Space::State(state);
    let mut heads = None;
    for step in &plan.steps {
        let reads = step.inputs.iter().enumerate().filter(|(_, o)| this(o)).map(|(number, _)| number);
        let writes = step.outputs.iter().filter(|o| this(o)).count();
        match &step.op {
            Op::CacheWrite if writes == 1 && this(&step.inputs[0]) => {}
            Op::CachedAttention(spec) if writes == 0 => {
                for number in reads {
                    if !matches!(number, 1 | 2) || heads.is_some_and(|h| h != spec.kv_heads) {
                        return None;
                    }
                    heads = Some(spec.kv_heads);
                }
            }
            _ if writes > 0 || reads.count() > 0 => return None,
            _ => {}
        }
    }
    Some(heads)
}
