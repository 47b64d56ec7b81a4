//! Columns for people.

/// Rows under a heading, each column as wide as its widest cell, indented by two spaces.
pub(crate) fn columns<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = heading.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = line(&widths, &heading.map(str::to_owned));
    for row in rows {
        text.push_str(&line(&widths, row));
    }
    text
}

fn line<const N: usize>(widths: &[usize; N], cells: &[String; N]) -> String {
    let padded: Vec<String> =
        cells.iter().zip(widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
    format!("  {}\n", padded.join("  ").trim_end())
}

/// `label: value` lines whose values stand in one column.
pub(crate) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0) + 1;
    fields
        .iter()
        .map(|(label, value)| format!("{:width$} {value}\n", format!("{label}:")))
        .collect()
}

/// A name from an image, safe to print: control characters and spaces shown as escapes.
pub(crate) fn name(name: &str) -> String {
    let is_plain = |c: char| !c.is_control() && !c.is_whitespace() && c != '"';
    if !name.is_empty() && name.chars().all(is_plain) {
        name.to_owned()
    } else {
        format!("{name:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a".to_owned(), "x".to_owned()], ["long".to_owned(), String::new()]];
        assert_eq!(columns(["N", "F"], &rows), "  N     F\n  a     x\n  long\n");
    }

    #[test]
    fn names_cannot_break_the_table() {
        assert_eq!(name("daily"), "daily");
        assert_eq!(name("a b\n"), r#""a b\n""#);
        assert_eq!(name(""), r#""""#);
    }
}
