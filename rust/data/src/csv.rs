//! Records of comma- or tab-separated values, by RFC 4180 and no more leniently: what a lenient reader would guess is
//! an error here, since a guess would silently join or cut documents.

/// Whether `record` needs a further line: in a whole record, quotes come in pairs.
pub(crate) fn is_open(record: &str) -> bool {
    record.bytes().filter(|&b| b == b'"').count() % 2 == 1
}

/// The fields of a record without its line end.
///
/// # Errors
/// What is wrong with the quotes.
pub(crate) fn fields(record: &str, delimiter: char) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = record;
    loop {
        let wrong = |what: &str| Err(format!("{what} in field {}", fields.len() + 1));
        let (field, after) = if let Some(mut inner) = rest.strip_prefix('"') {
            let mut field = String::new();
            loop {
                let Some((text, tail)) = inner.split_once('"') else {
                    return wrong("a quote that is never closed");
                };
                field.push_str(text);
                match tail.strip_prefix('"') {
                    Some(next) => {
                        field.push('"');
                        inner = next;
                    }
                    None => break (field, tail),
                }
            }
        } else {
            let end = rest.find(delimiter).unwrap_or(rest.len());
            if rest[..end].contains('"') {
                return wrong("a quote inside an unquoted text");
            }
            (rest[..end].to_owned(), &rest[end..])
        };
        match after.strip_prefix(delimiter) {
            Some(next) => {
                fields.push(field);
                rest = next;
            }
            None if after.is_empty() => {
                fields.push(field);
                return Ok(fields);
            }
            None => return wrong("text after the closing quote"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn broken_quotes_are_named() {
        for (record, reason) in [
            ("a,\"b", "never closed in field 2"),
            ("a\"b\"", "unquoted text in field 1"),
            ("\"a\"b,c", "closing quote in field 1"),
        ] {
            let text = fields(record, ',').unwrap_err();
            assert!(text.ends_with(reason), "{text}");
        }
    }

    proptest! {
        #[test]
        fn quoted_fields_come_back(texts in proptest::collection::vec("[a,\"\n é]{0,8}", 1..5)) {
            let quoted: Vec<_> = texts.iter().map(|t| format!("\"{}\"", t.replace('"', "\"\""))).collect();
            let record = quoted.join(",");
            prop_assert!(!is_open(&record));
            prop_assert_eq!(fields(&record, ',').unwrap(), texts);
        }

        #[test]
        fn no_record_panics(record in "[a,\"\n é]{0,16}") {
            let _ = fields(&record, ',');
        }
    }
}
