// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

/// @title The Merkle-sum tree of rewards. Same bytes as p2pfm/settlement/merkle.py.
/// @notice A leaf stands at its member's registry index; every node is hashed with the sums of both its children.
library RewardTree {
    /// @param cumulative all that the member was ever allotted [wei]
    /// @param reward allotted in this round [wei]
    /// @param contribution accumulated over the epoch, signed [nano-nats/token]
    /// @param served all that the member was ever allotted out of the ServingPool, which alone reads it [wei]
    struct Leaf {
        uint128 cumulative;
        uint128 reward;
        int128 contribution;
        uint128 served;
    }

    /// @param digest keccak256 of the children, or twice of a leaf; 0 for padding
    /// @param cumulative sum over the leaves below [wei]
    /// @param reward sum over the leaves below [wei]
    /// @param contribution sum of the positive ones below [nano-nats/token]
    struct Node {
        bytes32 digest;
        uint128 cumulative;
        uint128 reward;
        uint128 contribution;
    }

    /// @notice A leaf with the siblings from it up to the root.
    struct Proof {
        Leaf leaf;
        Node[] siblings;
    }

    /// @notice The leaf is not part of the root it was shown for.
    error BadProof();

    /// @notice The root that a tree of `numLeaves` has with this leaf at `index`, sums included.
    /// @dev Reverts with BadProof when there is no such index, when the path has another length than the tree's height
    /// (a node could pass for a leaf), or when sums overflow 128 bits.
    function root(Proof calldata proof, uint256 index, uint256 numLeaves) internal pure returns (Node memory node) {
        uint256 height = numLeaves < 2 ? 0 : Math.log2(numLeaves - 1) + 1;
        if (index >= numLeaves || proof.siblings.length != height) revert BadProof();
        node = leafNode(proof.leaf);
        Node[] calldata siblings = proof.siblings;
        for (uint256 i = 0; i < height; ++i) {
            step(node, siblings[i], (index >> i) & 1);
        }
    }

    function leafNode(Leaf calldata leaf) internal pure returns (Node memory) {
        bytes32 inner = keccak256(abi.encode(leaf));
        return Node(keccak256(abi.encode(inner)), leaf.cumulative, leaf.reward, positive(leaf.contribution));
    }

    function positive(int128 contribution) internal pure returns (uint128) {
        return contribution > 0 ? uint128(contribution) : 0;
    }

    /// @dev From a node to the one above it, in place. `side` is 1 if the node is the right child. By hand, because a
    /// claim in a tree of 10,000 leaves does it 14 times.
    function step(Node memory node, Node calldata sibling, uint256 side) internal pure {
        (uint256 cumulative, uint256 reward, uint256 contribution) =
            (sibling.cumulative, sibling.reward, sibling.contribution);
        assembly ("memory-safe") {
            // Two nodes of 96 bytes beside each other: digest, both amounts, contribution.
            let buffer := mload(0x40)
            let mine := add(buffer, mul(96, side))
            let other := add(buffer, mul(96, iszero(side)))
            mstore(mine, mload(node))
            mstore(add(mine, 32), or(shl(128, mload(add(node, 32))), mload(add(node, 64))))
            mstore(add(mine, 64), mload(add(node, 96)))
            mstore(other, calldataload(sibling))
            mstore(add(other, 32), or(shl(128, cumulative), reward))
            mstore(add(other, 64), contribution)
            mstore(node, keccak256(buffer, 192))
            cumulative := add(cumulative, mload(add(node, 32)))
            reward := add(reward, mload(add(node, 64)))
            contribution := add(contribution, mload(add(node, 96)))
        }
        if ((cumulative | reward | contribution) >> 128 != 0) revert BadProof();
        (node.cumulative, node.reward, node.contribution) =
            (uint128(cumulative), uint128(reward), uint128(contribution));
    }
}
