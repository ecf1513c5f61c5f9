//! Which special token plays which role.

use serde_json::{Map, Value};

use crate::Tokenizer;

/// The ids of special tokens by role, where the tokenizer has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Stands for the unknown.
    pub unk: Option<u32>,
    /// Fills short texts.
    pub pad: Option<u32>,
    /// Starts a text that is to be classified.
    pub cls: Option<u32>,
    /// Separates and ends texts.
    pub sep: Option<u32>,
    /// Hides a token.
    pub mask: Option<u32>,
    /// Starts a text that is to be continued.
    pub bos: Option<u32>,
    /// Ends it.
    pub eos: Option<u32>,
}

/// Names of tokenizer_config.json, and the strings that usually have the role, the first that is there.
const ROLES: [(&str, &[&str]); 7] = [
    ("unk_token", &["[UNK]", "<unk>", "<|endoftext|>"]),
    ("pad_token", &["[PAD]", "<pad>", "<|padding|>", "<|finetune_right_pad_id|>"]),
    ("cls_token", &["[CLS]", "<cls>"]),
    ("sep_token", &["[SEP]", "<sep>"]),
    ("mask_token", &["[MASK]", "<mask>"]),
    ("bos_token", &["<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|endoftext|>"]),
    ("eos_token", &["</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"]),
];

impl SpecialIds {
    fn slots(&mut self) -> [&mut Option<u32>; 7] {
        let Self { unk, pad, cls, sep, mask, bos, eos } = self;
        [unk, pad, cls, sep, mask, bos, eos]
    }

    /// These roles, those that are not filled as in `other`.
    pub(crate) fn or(mut self, other: &Self) -> Self {
        for (slot, other) in self.slots().into_iter().zip(other.clone().slots()) {
            *slot = slot.or(*other);
        }
        self
    }

    /// The roles that model, padding settings and usual names suggest.
    pub(crate) fn guess(tokenizer: &Tokenizer) -> Self {
        let mut ids = Self::default();
        for (slot, (_, names)) in ids.slots().into_iter().zip(ROLES) {
            let special = |id: &u32| tokenizer.is_special(*id);
            *slot = names.iter().filter_map(|name| tokenizer.token_to_id(name)).find(special);
        }
        if let Some(unk) = tokenizer.unk_token() {
            ids.unk = tokenizer.token_to_id(unk);
        }
        if let Some(padding) = tokenizer.padding() {
            ids.pad = tokenizer.token_to_id(&padding.pad_token).or(ids.pad);
        }
        ids
    }

    /// These roles with those that a tokenizer_config.json states.
    pub(crate) fn with_config(&self, tokenizer: &Tokenizer, config: &Map<String, Value>) -> Self {
        let mut ids = self.clone();
        for (slot, (name, _)) in ids.slots().into_iter().zip(ROLES) {
            // A string, or an object with the string as its content.
            let token = config.get(name).and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()));
            if let Some(id) = token.and_then(|token| tokenizer.token_to_id(token)) {
                *slot = Some(id);
            }
        }
        ids
    }

    /// The tokenizer_config.json that states these roles.
    pub(crate) fn to_config(&self, tokenizer: &Tokenizer) -> String {
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        if let Some(truncation) = tokenizer.truncation() {
            config.insert("model_max_length".into(), truncation.max_length.into());
        }
        for (slot, (name, _)) in self.clone().slots().into_iter().zip(ROLES) {
            if let Some(token) = slot.and_then(|id| tokenizer.id_to_token(id)) {
                config.insert(name.into(), token.into());
            }
        }
        format!("{:#}\n", Value::Object(config))
    }
}
