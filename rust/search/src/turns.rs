//! A search and a model taking turns: the loop of decoding, and where the tokens lie in a cache of keys and values.
//!
//! Letters: A active sequences, S cache slots, V vocabulary size.

use crate::search::{Emitted, Search, Step};
use crate::{Error, Result};

/// In which rows of a cache the positions of each active sequence lie. Beams share what they have in common; a step
/// copies rows of this table, never keys or values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Positions {
    slots: usize,
    /// How many positions each active sequence has in the cache, [A].
    lengths: Vec<i32>,
    /// In which cache row each of them lies, [A, S].
    rows: Vec<i32>,
}

impl Positions {
    /// A table of sequences that have read `lengths` [A] tokens, which lie in `rows` [A, S].
    ///
    /// # Errors
    /// [`Error::Outside`] if the sizes do not fit together, or a length is not in 0..=S.
    pub fn new(slots: usize, lengths: Vec<i32>, rows: Vec<i32>) -> Result<Self> {
        let fits = |&length: &i32| usize::try_from(length).is_ok_and(|length| length <= slots);
        if rows.len() != lengths.len() * slots || !lengths.iter().all(fits) {
            let (places, sequences) = (rows.len(), lengths.len());
            return Err(Error::Outside(format!(
                "a table of {places} places and lengths {lengths:?} is none of {sequences} sequences and {slots} slots"
            )));
        }
        Ok(Self { slots, lengths, rows })
    }

    /// Positions of a sequence that the cache holds.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// How many of them each active sequence has read, [A].
    #[must_use]
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// In which cache row each lies, [A, S].
    #[must_use]
    pub fn rows(&self) -> &[i32] {
        &self.rows
    }

    /// Whether each sequence of a step has room for one token more.
    fn has_room(&self, step: &Step) -> bool {
        step.parents.iter().all(|&p| (self.lengths[p as usize] as usize) < self.slots)
    }

    /// Makes each sequence of a step the continuation of its parent, with a token more, which lies in the cache row of
    /// the sequence's own number: no other one ever needs that row at this position.
    fn follow(&mut self, step: &Step) {
        let slots = self.slots;
        let mut rows = Vec::with_capacity(step.parents.len() * slots);
        let mut lengths = Vec::with_capacity(step.parents.len());
        for (&parent, &sequence) in step.parents.iter().zip(&step.sequences) {
            let (parent, first) = (parent as usize, rows.len());
            let length = self.lengths[parent];
            rows.extend_from_slice(&self.rows[parent * slots..(parent + 1) * slots]);
            rows[first + length as usize] = sequence.cast_signed();
            lengths.push(length + 1);
        }
        (self.rows, self.lengths) = (rows, lengths);
    }
}

/// What says which tokens follow.
pub trait Model {
    /// Its errors, and the search's.
    type Error: From<Error>;

    /// Whether it reads steps of so many active sequences.
    fn takes(&self, active: usize) -> bool;

    /// Reads the token of each active sequence, the last of its `positions`, and gives the logits [A, V] behind it.
    ///
    /// # Errors
    /// The model's own.
    fn read(&mut self, step: &Step, positions: &Positions) -> std::result::Result<&[f32], Self::Error>;
}

impl Search {
    /// Takes turns with a model from the second step on, until the search ends, `enough` says so before a step, the
    /// model takes no step of so many sequences, or a sequence has no slot left. Gives the tokens that became certain.
    ///
    /// # Errors
    /// [`Error::Outside`] before the prompts were read, or if `positions` are those of other sequences; else as
    /// [`Search::advance`], and the model's own.
    pub fn decode<M: Model>(
        &mut self,
        positions: &mut Positions,
        model: &mut M,
        mut enough: impl FnMut() -> bool,
    ) -> std::result::Result<Vec<Emitted>, M::Error> {
        let mut emitted = Vec::new();
        while let Some(step) = self.step() {
            let before = positions.lengths.len();
            if step.index == 0 || step.parents.iter().any(|&p| p as usize >= before) {
                return Err(
                    Error::Outside(format!("step {} follows no {before} sequences", step.index)).into()
                );
            }
            if !model.takes(step.tokens.len()) || !positions.has_room(step) || enough() {
                break;
            }
            positions.follow(step);
            let logits = model.read(step, positions)?;
            self.advance(logits)?;
            emitted.extend_from_slice(self.emitted());
        }
        Ok(emitted)
    }

    /// Prompt and new tokens of each active row.
    pub fn texts(&self) -> impl Iterator<Item = &[u32]> {
        self.paths().map(|path| &path.ids[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GenerationOptions;

    /// Reads its cache: what follows depends on all tokens before, found by way of the table.
    struct Sums {
        cache: Vec<Vec<u32>>,
        logits: Vec<f32>,
        vocab_size: usize,
    }

    impl Sums {
        fn row(&self, positions: &Positions, i: usize) -> Vec<f32> {
            let table = &positions.rows()[i * positions.slots()..][..positions.lengths()[i] as usize];
            let text = table.iter().enumerate().map(|(at, &row)| u64::from(self.cache[row as usize][at]));
            let sum = text.fold(7, |sum, token| (sum * 31 + token) % 1009);
            (0..self.vocab_size).map(|v| ((sum * (v as u64 + 3)) % 101) as f32 / 10.0).collect()
        }

        fn write(&mut self, step: &Step, positions: &Positions) {
            for (i, (&token, &sequence)) in step.tokens.iter().zip(&step.sequences).enumerate() {
                self.cache[sequence as usize][positions.lengths()[i] as usize - 1] = token;
            }
        }
    }

    impl Model for Sums {
        type Error = Error;

        fn takes(&self, active: usize) -> bool {
            active <= self.cache.len()
        }

        fn read(&mut self, step: &Step, positions: &Positions) -> Result<&[f32]> {
            self.write(step, positions);
            self.logits = (0..step.tokens.len()).flat_map(|i| self.row(positions, i)).collect();
            Ok(&self.logits)
        }
    }

    fn run(options: &GenerationOptions, slots: usize, at_a_time: usize) -> (Vec<Vec<u32>>, usize) {
        let (vocab_size, prompts) = (11, [vec![1, 2, 3], vec![4], vec![5, 6]]);
        let each = options.num_beams.max(options.num_return_sequences);
        let prompt = |ids: &Vec<u32>| ids.clone().into();
        let mut search = Search::new(options.clone(), prompts.iter().map(prompt), vocab_size).expect("valid");
        let mut model =
            Sums { cache: vec![vec![0; slots]; prompts.len() * each], logits: vec![], vocab_size };
        let (mut lengths, mut rows) = (vec![], vec![0; prompts.len() * slots]);
        for (i, ids) in prompts.iter().enumerate() {
            model.cache[i * each][..ids.len()].copy_from_slice(ids);
            rows[i * slots..][..ids.len()].fill((i * each) as i32);
            lengths.push(ids.len() as i32);
        }
        let mut positions = Positions::new(slots, lengths, rows).expect("valid");
        let logits: Vec<f32> = (0..prompts.len()).flat_map(|i| model.row(&positions, i)).collect();
        search.advance(&logits).expect("valid");
        let mut calls = 0;
        loop {
            let (mut left, before) = (at_a_time, search.step().map(|s| s.index));
            let enough = || {
                left = left.wrapping_sub(1);
                left == usize::MAX
            };
            search.decode(&mut positions, &mut model, enough).expect("valid");
            calls += 1;
            if search.step().is_none() || search.step().map(|s| s.index) == before {
                break;
            }
        }
        (search.finish().into_iter().map(|h| h.ids).collect(), calls)
    }

    #[test]
    fn any_number_of_steps_at_a_time_gives_the_same() {
        let base = GenerationOptions { max_new_tokens: Some(9), ..Default::default() };
        let sampled = GenerationOptions { do_sample: true, num_return_sequences: 2, ..base.clone() };
        let beams = GenerationOptions { num_beams: 4, num_return_sequences: 4, ..base.clone() };
        for options in [base, sampled, beams] {
            let (want, calls) = run(&options, 40, usize::MAX - 1);
            assert_eq!(calls, 1);
            for at_a_time in [1, 2, 5] {
                assert_eq!(run(&options, 40, at_a_time).0, want);
            }
        }
    }

    #[test]
    fn it_stops_where_a_sequence_has_no_slot_left() {
        let options = GenerationOptions { max_new_tokens: Some(9), ..Default::default() };
        let (ids, _) = run(&options, 6, usize::MAX - 1);
        // The longest prompt has 3 tokens, and each of three steps reads one more.
        assert!(ids.iter().all(|ids| ids.len() == 4), "{ids:?}");
    }

    #[test]
    fn tables_must_fit() {
        assert!(Positions::new(3, vec![1, 2], vec![0; 5]).is_err());
        assert!(Positions::new(3, vec![4], vec![0; 3]).is_err());
        assert!(Positions::new(3, vec![-1], vec![0; 3]).is_err());
        let mut search = Search::new(GenerationOptions::default(), [vec![1].into()], 11).expect("valid");
        let mut positions = Positions::new(3, vec![1], vec![0; 3]).expect("valid");
        let mut model = Sums { cache: vec![vec![0; 3]], logits: vec![], vocab_size: 11 };
        assert!(search.decode(&mut positions, &mut model, || false).is_err());
    }
}
