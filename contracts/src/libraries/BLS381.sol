// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title BLS12-381 by the EIP-2537 precompiles: keys in G1, signatures in G2.
/// @notice Hashing equals the ciphersuites BLS_SIG_... and BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_ (RFC 9380).
/// The addition precompiles check the curve, not the subgroup: whatever ends in `verify` is checked there, by the
/// pairing. A failing precompile burns all gas it was given, so each gets its exact price.
library BLS381 {
    /// @dev Memory layout is the precompiles' encoding: x, y of 64 bytes each, big endian.
    struct G1 {
        uint256 xHigh;
        uint256 xLow;
        uint256 yHigh;
        uint256 yLow;
    }

    /// @dev A G1 point in three slots: a coordinate has 48 bytes.
    struct PackedG1 {
        uint256 xLow;
        uint256 yLow;
        uint256 high;
    }

    /// @dev The field's modulus.
    uint256 private constant P_HIGH = 0x1a0111ea397fe69a4b1ba7b6434bacd7;
    uint256 private constant P_LOW = 0x64774b84f38512bf6730d2a0f6b0f6241eabfffeb153ffffb9feffffffffaaab;

    uint256 private constant G1ADD_GAS = 375;
    uint256 private constant G2ADD_GAS = 600;
    uint256 private constant MAP_FP2_GAS = 23_800;
    uint256 private constant PAIRING_2_GAS = 102_900;
    /// @dev Far above the price of modexp with a 64-byte modulus and exponent 1 (200, later forks 500).
    uint256 private constant MODEXP_GAS = 10_000;

    /// @notice A precompile is missing or refused its input: not a chain with EIP-2537, or a point off the curve.
    error PrecompileFailed(uint256 which);

    function pack(G1 memory p) internal pure returns (PackedG1 memory) {
        return PackedG1(p.xLow, p.yLow, (p.xHigh << 128) | p.yHigh);
    }

    function unpack(PackedG1 memory p) internal pure returns (G1 memory) {
        return G1(p.high >> 128, p.xLow, p.high & type(uint128).max, p.yLow);
    }

    function isInfinity(G1 memory p) internal pure returns (bool) {
        return p.xHigh | p.xLow | p.yHigh | p.yLow == 0;
    }

    /// @notice a + b.
    function add(G1 memory a, G1 memory b) internal view returns (G1 memory sum) {
        bool success;
        assembly ("memory-safe") {
            let input := mload(0x40)
            mcopy(input, a, 128)
            mcopy(add(input, 128), b, 128)
            success := staticcall(G1ADD_GAS, 0x0b, input, 256, sum, 128)
            success := and(success, eq(returndatasize(), 128))
        }
        if (!success) revert PrecompileFailed(0x0b);
    }

    /// @notice -p.
    function negate(G1 memory p) internal pure returns (G1 memory) {
        if (isInfinity(p)) return p;
        unchecked {
            uint256 borrow = p.yLow > P_LOW ? 1 : 0;
            return G1(p.xHigh, p.xLow, P_HIGH - p.yHigh - borrow, P_LOW - p.yLow);
        }
    }

    /// @notice Whether `signature` is `key`'s signature of `message` under the domain tag `tag`.
    /// @dev e(key, H(message)) * e(-generator, signature) == 1. False for infinity on either side.
    function verify(G1 memory key, bytes32 message, uint256[8] memory signature, bytes memory tag)
        internal
        view
        returns (bool isValid)
    {
        if (isInfinity(key) || _isZero(signature)) return false;
        uint256[8] memory hashed = hashToG2(message, tag);
        assembly ("memory-safe") {
            let input := mload(0x40)
            mcopy(input, key, 128)
            mcopy(add(input, 128), hashed, 256)
            mstore(add(input, 384), 0x17f1d3a73197d7942695638c4fa9ac0f)
            mstore(add(input, 416), 0xc3688c4f9774b905a14e3a3f171bac586c55e83ff97a1aeffb3af00adb22c6bb)
            mstore(add(input, 448), 0x114d1d6855d545a8aa7d76c8cf2e21f2)
            mstore(add(input, 480), 0x67816aef1db507c96655b9d5caac42364e6f38ba0ecb751bad54dcd6b939c2ca)
            mcopy(add(input, 512), signature, 256)
            let success := staticcall(PAIRING_2_GAS, 0x0f, input, 768, 0, 32)
            isValid := and(and(success, eq(returndatasize(), 32)), eq(mload(0), 1))
        }
    }

    /// @notice hash_to_curve of RFC 9380 for G2.
    /// @dev The precompile clears the cofactor of each mapped point; that is linear, so the sum is the same.
    function hashToG2(bytes32 message, bytes memory tag) internal view returns (uint256[8] memory point) {
        bytes memory uniform = _expand(message, tag);
        bool success;
        assembly ("memory-safe") {
            let input := mload(0x40)
            // modexp(base of 64 bytes, exponent 1, modulus of 64 bytes), four times; results lie at fields
            let fields := add(input, 256)
            mstore(input, 64)
            mstore(add(input, 32), 1)
            mstore(add(input, 64), 64)
            mstore8(add(input, 160), 1)
            mstore(add(input, 161), P_HIGH)
            mstore(add(input, 193), P_LOW)
            success := 1
            for { let i := 0 } lt(i, 256) { i := add(i, 64) } {
                mcopy(add(input, 96), add(add(uniform, 32), i), 64)
                success := and(success, staticcall(MODEXP_GAS, 0x05, input, 225, add(fields, i), 64))
            }
            let mapped := add(fields, 256)
            success := and(success, staticcall(MAP_FP2_GAS, 0x11, fields, 128, mapped, 256))
            success := and(success, staticcall(MAP_FP2_GAS, 0x11, add(fields, 128), 128, add(mapped, 256), 256))
            success := and(success, staticcall(G2ADD_GAS, 0x0d, mapped, 512, point, 256))
            success := and(success, eq(returndatasize(), 256))
        }
        if (!success) revert PrecompileFailed(0x11);
    }

    /// @dev expand_message_xmd with SHA-256 to 256 bytes.
    function _expand(bytes32 message, bytes memory tag) private pure returns (bytes memory) {
        bytes memory suffix = abi.encodePacked(tag, uint8(tag.length));
        bytes32 first = sha256(abi.encodePacked(uint256(0), uint256(0), message, uint16(256), uint8(0), suffix));
        bytes32[8] memory blocks;
        blocks[0] = sha256(abi.encodePacked(first, uint8(1), suffix));
        for (uint256 i = 1; i < 8; ++i) {
            blocks[i] = sha256(abi.encodePacked(first ^ blocks[i - 1], uint8(i + 1), suffix));
        }
        return abi.encodePacked(blocks);
    }

    function _isZero(uint256[8] memory words) private pure returns (bool) {
        // Zero by default; written out, it makes the optimiser inline 1.3 kB more.
        // slither-disable-next-line uninitialized-local
        uint256 all;
        for (uint256 i = 0; i < 8; ++i) {
            all |= words[i];
        }
        return all == 0;
    }
}
