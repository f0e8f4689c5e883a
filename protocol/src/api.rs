//! Bearer tokens for the API: a technician's device says that whoever shows this acts for it. The server looks the device
//! up and checks with its key, so that nothing is stored, and a revoked device's tokens are void.
//!
//! A token is a PASETO v4.public token (Ed25519) whose payload is the JSON of [`ApiToken`].

use pasetors::keys::{AsymmetricPublicKey, AsymmetricSecretKey};
use pasetors::token::{Public, UntrustedToken};
use pasetors::version4::{PublicToken, V4};
use serde::{Deserialize, Serialize};

use crate::id::DeviceId;

/// Longest token that is read, in bytes. A real one has about 210.
pub const MAX_API_TOKEN: usize = 1024;
/// The longest time that one is good for, in seconds: 90 days.
pub const MAX_API_SECONDS: u64 = 90 * 24 * 60 * 60;
/// How far ahead the clock of the device may be, in seconds.
const LEEWAY: u64 = 300;

/// So that no other token signed with the same key is ever taken for one of these.
const PURPOSE: &[u8] = b"adit api v1";

/// What a token says. Every field is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiToken {
    /// The technician's device.
    pub device: DeviceId,
    /// When it was made. Seconds since 1970-01-01 UTC.
    pub issued: u64,
    /// When it ends. Seconds since 1970-01-01 UTC.
    pub expires: u64,
}

impl ApiToken {
    /// The signed text of this token.
    ///
    /// # Errors
    /// [`ApiTokenError::Key`] when `key` is not a 64-byte Ed25519 key (seed and public key).
    pub fn sign(&self, key: &[u8]) -> Result<String, ApiTokenError> {
        let key = AsymmetricSecretKey::<V4>::from(key).map_err(|_| ApiTokenError::Key)?;
        let claims = serde_json::to_vec(self).map_err(|_| ApiTokenError::Key)?;
        PublicToken::sign(&key, &claims, None, Some(PURPOSE)).map_err(|_| ApiTokenError::Key)
    }

    /// Reads a token: `key_of` says the 32-byte public key of the device that it names, `now` is in seconds since
    /// 1970-01-01 UTC.
    ///
    /// # Errors
    /// [`ApiTokenError`] says what did not hold.
    pub fn verify(
        text: &str,
        key_of: impl FnOnce(DeviceId) -> Option<[u8; 32]>,
        now: u64,
    ) -> Result<Self, ApiTokenError> {
        if text.len() > MAX_API_TOKEN {
            return Err(ApiTokenError::Malformed);
        }
        let token = UntrustedToken::<Public, V4>::try_from(text).map_err(|_| ApiTokenError::Malformed)?;
        let said: Self =
            serde_json::from_slice(token.untrusted_payload()).map_err(|_| ApiTokenError::Malformed)?;
        let key = key_of(said.device).ok_or(ApiTokenError::Signature)?;
        let key = AsymmetricPublicKey::<V4>::from(&key).map_err(|_| ApiTokenError::Key)?;
        PublicToken::verify(&key, &token, None, Some(PURPOSE)).map_err(|_| ApiTokenError::Signature)?;
        let life = said.expires.checked_sub(said.issued).ok_or(ApiTokenError::Malformed)?;
        if now >= said.expires || life > MAX_API_SECONDS || said.issued > now.saturating_add(LEEWAY) {
            return Err(ApiTokenError::Expired);
        }
        Ok(said)
    }
}

/// Why a token was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ApiTokenError {
    /// Not a PASETO v4.public token with these claims inside.
    #[error("malformed token")]
    Malformed,
    /// Not signed by that device, or no such device.
    #[error("the token's signature is wrong")]
    Signature,
    /// Its time is over, or longer than it may be.
    #[error("the token has expired")]
    Expired,
    /// The key handed in is none.
    #[error("not an Ed25519 key")]
    Key,
}

#[cfg(test)]
mod tests {
    use super::*;
    use pasetors::keys::{AsymmetricKeyPair, Generate};

    #[test]
    fn a_token_is_good_for_its_device_and_its_time() {
        let pair = AsymmetricKeyPair::<V4>::generate().expect("randomness");
        let key: [u8; 32] = pair.public.as_bytes().try_into().expect("32 bytes");
        let token = ApiToken { device: DeviceId([7; 16]), issued: 1000, expires: 2000 };
        let text = token.sign(pair.secret.as_bytes()).expect("a key");
        let of = |device: DeviceId| (device == token.device).then_some(key);
        assert_eq!(ApiToken::verify(&text, of, 1000), Ok(token));
        assert_eq!(ApiToken::verify(&text, of, 2000), Err(ApiTokenError::Expired));
        assert_eq!(ApiToken::verify(&text, of, 600), Err(ApiTokenError::Expired), "from the future");
        assert_eq!(ApiToken::verify(&text, |_| None, 1000), Err(ApiTokenError::Signature));
        assert!(ApiToken::verify(&text, |_| Some([9; 32]), 1000).is_err());
        let long = ApiToken { expires: 1001 + MAX_API_SECONDS, ..token };
        let text = long.sign(pair.secret.as_bytes()).expect("a key");
        assert_eq!(ApiToken::verify(&text, of, 1000), Err(ApiTokenError::Expired));
        let back = ApiToken { expires: 1, ..token }.sign(pair.secret.as_bytes()).expect("a key");
        assert_eq!(ApiToken::verify(&back, of, 0), Err(ApiTokenError::Malformed));
        for wrong in ["", "v4.public.", "v4.public.AAAA", &"x".repeat(2000)] {
            assert_eq!(ApiToken::verify(wrong, of, 1000), Err(ApiTokenError::Malformed));
        }
    }
}
