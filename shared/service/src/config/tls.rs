//! `[gateway.tls]`: certificate files, or a certificate from an ACME authority.

use super::reader::Section;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Let's Encrypt's production directory.
const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";
/// Let's Encrypt's own limit on the names of one certificate.
const MOST_DOMAINS: usize = 100;

/// Where the certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsConfig {
    Files(CertificateFiles),
    Acme(AcmeConfig),
}

/// `gateway.tls.cert` and `gateway.tls.key`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// PEM file: the certificate, then its intermediates.
    pub cert: PathBuf,
    /// PEM file: the private key.
    pub key: PathBuf,
}

/// `[gateway.tls.acme]`. Configuring it means agreeing to the authority's terms of service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcmeConfig {
    /// The names of the certificate, in lower case. At least one.
    pub domains: Vec<String>,
    /// Mail address for the authority's messages about its certificates. Default none.
    pub contact: Option<String>,
    /// URL of the authority's directory. Default Let's Encrypt's.
    pub directory: String,
    /// PEM file of authorities to trust, in addition to the system's, for the directory's own certificate. Default none.
    pub ca: Option<PathBuf>,
}

impl TlsConfig {
    pub(super) fn read(mut section: Section<'_>) -> Option<TlsConfig> {
        let files = section.has("cert") || section.has("key");
        let config = match section.section("acme") {
            Some(acme) if files => {
                section.problem(
                    "acme",
                    "cannot be combined with cert or key: a certificate comes from files or from an authority",
                );
                AcmeConfig::read(acme);
                // Read, so that they are not reported as unknown too.
                for key in ["cert", "key"] {
                    section.text(key);
                }
                None
            }
            Some(acme) => AcmeConfig::read(acme).map(TlsConfig::Acme),
            // Not a table: reported already.
            None if section.was_given("acme") => None,
            None => CertificateFiles::read(&mut section).map(TlsConfig::Files),
        };
        section.finish();
        config
    }

    /// The files to watch for changes.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            TlsConfig::Files(CertificateFiles { cert, key }) => vec![cert.clone(), key.clone()],
            TlsConfig::Acme(acme) => acme.ca.iter().cloned().collect(),
        }
    }
}

impl CertificateFiles {
    fn read(section: &mut Section<'_>) -> Option<CertificateFiles> {
        let mut file = |key| {
            let path = section.text(key);
            if path.is_none() {
                section.problem(key, "is missing: name a PEM file, or get a certificate by [gateway.tls.acme]");
            }
            path.map(PathBuf::from)
        };
        let (cert, key) = (file("cert"), file("key"));
        Some(CertificateFiles { cert: cert?, key: key? })
    }
}

impl AcmeConfig {
    fn read(mut section: Section<'_>) -> Option<AcmeConfig> {
        let domains = section.texts("domains");
        let domains = match domains {
            Some(names) => domains_of(&section, names),
            None if section.was_given("domains") => None,
            None => {
                section.problem("domains", "is missing: name the hosts of the certificate, [\"hooks.example.com\"]");
                None
            }
        };
        let contact = section.parsed("contact", |address| match address.trim_start_matches("mailto:") {
            mail if mail.contains('@') && !mail.contains(char::is_whitespace) => Ok(mail.to_owned()),
            _ => Err(format!("invalid mail address {address:?}: expected one like \"ops@example.com\"")),
        });
        let directory = section.parsed("directory", |url| match url.parse::<hyper::Uri>() {
            Ok(parsed)
                if parsed.scheme_str() == Some("https") && parsed.host().is_some_and(|host| !host.is_empty()) =>
            {
                Ok(url.to_owned())
            }
            _ => Err(format!("invalid URL {url:?}: expected the https:// address of an ACME directory")),
        });
        let ca = section.text("ca").map(PathBuf::from);
        section.finish();
        Some(AcmeConfig {
            domains: domains?,
            contact,
            directory: directory.unwrap_or_else(|| LETS_ENCRYPT.to_owned()),
            ca,
        })
    }
}

fn domains_of(section: &Section<'_>, names: Vec<String>) -> Option<Vec<String>> {
    if names.is_empty() || names.len() > MOST_DOMAINS {
        section.problem("domains", format!("takes 1 to {MOST_DOMAINS} host names"));
        return None;
    }
    let mut domains = Vec::new();
    let mut seen = BTreeSet::new();
    for name in &names {
        match domain(name) {
            Ok(domain) if seen.insert(domain.clone()) => domains.push(domain),
            Ok(_) => section.problem("domains", format!("{name:?} is listed twice")),
            Err(what) => section.problem("domains", what),
        }
    }
    (domains.len() == names.len()).then_some(domains)
}

/// The name in lower case, if this challenge can prove it (RFC 8737: only host names).
fn domain(name: &str) -> Result<String, String> {
    if name.starts_with("*.") {
        return Err(format!("{name:?}: TLS-ALPN-01 proves no wildcard; name each host, or use certificate files"));
    }
    if name.parse::<std::net::IpAddr>().is_ok() {
        return Err(format!("{name:?} is an address: expected a host name"));
    }
    let is_label = |label: &str| {
        let has_edges = !label.starts_with('-') && !label.ends_with('-');
        (1..=63).contains(&label.len())
            && has_edges
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if name.len() > 253 || !name.split('.').all(is_label) {
        return Err(format!(
            "invalid host name {name:?}: expected one like \"hooks.example.com\", without scheme, port or path"
        ));
    }
    Ok(name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::reader::Report;
    use std::collections::BTreeMap;

    fn read(text: &str) -> (Option<TlsConfig>, Vec<String>) {
        let report = Report::new(BTreeMap::new());
        let config = TlsConfig::read(Section::root(toml::from_str(text).unwrap(), &report));
        (config, report.into_problems().into_iter().map(|problem| problem.to_string()).collect())
    }

    #[test]
    fn an_authority_is_read_with_its_defaults() {
        let (config, problems) =
            read("acme = { domains = [\"Hooks.Example.com\"], contact = \"mailto:ops@example.com\" }");
        assert_eq!(problems, [""; 0]);
        let expected = AcmeConfig {
            domains: vec!["hooks.example.com".to_owned()],
            contact: Some("ops@example.com".to_owned()),
            directory: LETS_ENCRYPT.to_owned(),
            ca: None,
        };
        assert_eq!(config, Some(TlsConfig::Acme(expected)));
    }

    #[test]
    fn each_mistake_is_reported_once_with_its_key() {
        for (text, key) in [
            ("acme = 1", "acme: takes a table"),
            ("acme = {}", "acme.domains: is missing"),
            ("acme = { domains = [] }", "acme.domains: takes 1 to 100"),
            ("acme = { domains = [\"a.b\", \"A.b\"] }", "acme.domains: \"A.b\" is listed twice"),
            ("acme = { domains = [\"*.a.b\"] }", "acme.domains: \"*.a.b\": TLS-ALPN-01"),
            ("acme = { domains = [\"192.0.2.1\"] }", "acme.domains: \"192.0.2.1\" is an address"),
            ("acme = { domains = [\"https://a.b\"] }", "acme.domains: invalid host name"),
            ("acme = { domains = [\"a.b:443\"] }", "acme.domains: invalid host name"),
            ("acme = { domains = [\"a.b\"], contact = \"ops\" }", "acme.contact: invalid mail"),
            ("acme = { domains = [\"a.b\"], directory = \"http://x\" }", "acme.directory: invalid URL"),
            ("acme = { domains = [\"a.b\"], directory = \"https:///dir\" }", "acme.directory: invalid URL"),
            ("acme = { domains = [\"a.b\"], directory = \"https://acme.exämple/dir\" }", "acme.directory: invalid URL"),
            ("acme = { domains = [\"a.b\"], staging = true }", "acme.staging: unknown key"),
            ("acme = { domains = [\"a.b\"] }\ncert = \"c\"", "acme: cannot be combined"),
            ("cert = \"c\"", "key: is missing"),
        ] {
            let (_, problems) = read(text);
            assert!(problems.len() == 1 && problems[0].starts_with(key), "{text}: {problems:?}");
        }
    }
}
