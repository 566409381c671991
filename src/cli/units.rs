//! Sizes, durations and bit rates as people write them. Numbers are whole and have a unit: what
//! `512` would mean differs from tool to tool, so it is an error that says what to write.

/// Why a text is no quantity; to be read after the option and the text itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("not a size: it takes a whole number and a unit, like 512M or 4G")]
    Size,
    /// Not a duration.
    #[error("not a duration: it takes a whole number and a unit, like 50ms, 30s, 10m or 1h")]
    Duration,
    /// Not a bit rate.
    #[error("not a bit rate: it takes a whole number and a unit, like 500M or 1G (bit/s)")]
    BitRate,
    /// More than 64 bits hold.
    #[error("too big")]
    TooBig,
}

/// Parses a size into bytes: `K`, `M`, `G` and `T` (also `KiB`, ...) are powers of 1024. `0` needs no unit.
///
/// # Errors
/// [`UnitError::Size`] or [`UnitError::TooBig`].
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text).ok_or(UnitError::Size)?;
    let unit = unit.strip_suffix("iB").unwrap_or(unit);
    let shift = match unit {
        "" if number == Some(0) => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(UnitError::Size),
    };
    scale(number, 1 << shift)
}

/// Parses a duration into milliseconds: `ms`, `s`, `m` (minutes) and `h`.
///
/// # Errors
/// [`UnitError::Duration`] or [`UnitError::TooBig`].
pub fn parse_duration_ms(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text).ok_or(UnitError::Duration)?;
    let ms = match unit {
        "" if number == Some(0) => 1,
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(UnitError::Duration),
    };
    scale(number, ms)
}

/// Parses a bit rate into bits per second: `K`, `M`, `G` and `T` are powers of 1000, and `bit/s` may follow.
///
/// # Errors
/// [`UnitError::BitRate`] or [`UnitError::TooBig`].
pub fn parse_bit_rate(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text).ok_or(UnitError::BitRate)?;
    let factor = match unit.strip_suffix("bit/s").unwrap_or(unit) {
        "K" | "k" => 1_000,
        "M" | "m" => 1_000_000,
        "G" | "g" => 1_000_000_000,
        "T" | "t" => 1_000_000_000_000,
        _ => return Err(UnitError::BitRate),
    };
    scale(number, factor)
}

/// Splits a text into its number, `None` for one of over 64 bits, and its unit.
fn split(text: &str) -> Option<(Option<u64>, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if number.is_empty() { None } else { Some((number.parse().ok(), unit)) }
}

fn scale(number: Option<u64>, factor: u64) -> Result<u64, UnitError> {
    number.and_then(|number| number.checked_mul(factor)).ok_or(UnitError::TooBig)
}

/// A size in the largest unit that shows it whole: `1536 MiB`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in units {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// A size that was measured, to a tenth of the largest unit that it reaches: `61.7 MiB`.
#[must_use]
pub fn format_measured(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in units {
        if bytes >> shift > 0 {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1023.9 KiB"),
            (64_731_749, "61.7 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(format_measured(bytes), text);
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4g"), Ok(4 << 30));
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("5T"), Ok(5 << 40));
        assert_eq!(parse_size("0"), Ok(0));
        for text in ["", "abc", "512", "1.5G", "-1M", "+1M", "1MB", "1 M", "M", "1iB", "1M2", "٣M"]
        {
            assert_eq!(parse_size(text), Err(UnitError::Size), "{text}");
        }
        for text in ["16777216T", "99999999999999999999M"] {
            assert_eq!(parse_size(text), Err(UnitError::TooBig), "{text}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration_ms("50ms"), Ok(50));
        assert_eq!(parse_duration_ms("30s"), Ok(30_000));
        assert_eq!(parse_duration_ms("10m"), Ok(600_000));
        assert_eq!(parse_duration_ms("1h"), Ok(3_600_000));
        assert_eq!(parse_duration_ms("0"), Ok(0));
        for text in ["", "50", "1.5s", "1d", "ms", "-1s", "1m30s", "1M"] {
            assert_eq!(parse_duration_ms(text), Err(UnitError::Duration), "{text}");
        }
        assert_eq!(parse_duration_ms("18446744073709551615h"), Err(UnitError::TooBig));
    }

    #[test]
    fn bit_rates() {
        assert_eq!(parse_bit_rate("1G"), Ok(1_000_000_000));
        assert_eq!(parse_bit_rate("500Mbit/s"), Ok(500_000_000));
        assert_eq!(parse_bit_rate("64k"), Ok(64_000));
        for text in ["", "1", "1GB/s", "G", "1Gb", "bit/s", "1 G"] {
            assert_eq!(parse_bit_rate(text), Err(UnitError::BitRate), "{text}");
        }
        assert_eq!(parse_bit_rate("99999999999T"), Err(UnitError::TooBig));
    }

    #[test]
    fn sizes_print_whole() {
        for (bytes, text) in [
            (0, "0 B"),
            (1000, "1000 B"),
            (32 << 20, "32 MiB"),
            (1 << 30, "1 GiB"),
            ((1 << 30) + (1 << 29), "1536 MiB"),
            (4 << 40, "4 TiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }
}
