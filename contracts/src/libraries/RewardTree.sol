// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title The Merkle-sum tree of rewards. Same bytes as p2pfm/settlement/merkle.py.
/// @notice A leaf stands at its member's registry index; every node is hashed with the sums of both its children.
library RewardTree {
    /// @param cumulative all that the member was ever allotted [wei]
    /// @param reward allotted in this round [wei]
    /// @param contribution accumulated over the epoch, signed [nano-nats/token]
    struct Leaf {
        uint128 cumulative;
        uint128 reward;
        int128 contribution;
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

    /// @notice The leaf is not part of the root it was shown for.
    error BadProof();

    /// @dev More leaves than any registry can have.
    uint256 private constant HEIGHT_MAX = 64;

    /// @notice The root that `leaf` at `index` has with these siblings, sums included.
    /// @dev Reverts with BadProof when the path is too short for the index, or when sums overflow 128 bits.
    function root(Leaf calldata leaf, uint256 index, Node[] calldata siblings) internal pure returns (Node memory node) {
        if (siblings.length > HEIGHT_MAX || index >> siblings.length != 0) revert BadProof();
        node = leafNode(leaf);
        for (uint256 i = 0; i < siblings.length; ++i) {
            Node memory sibling = siblings[i];
            node = (index >> i) & 1 == 1 ? parent(sibling, node) : parent(node, sibling);
        }
    }

    function leafNode(Leaf calldata leaf) internal pure returns (Node memory) {
        bytes32 inner = keccak256(abi.encode(leaf.cumulative, leaf.reward, leaf.contribution));
        uint128 positive = leaf.contribution > 0 ? uint128(leaf.contribution) : 0;
        return Node(keccak256(abi.encode(inner)), leaf.cumulative, leaf.reward, positive);
    }

    function parent(Node memory left, Node memory right) internal pure returns (Node memory) {
        bytes32 digest = keccak256(
            abi.encodePacked(
                left.digest,
                left.cumulative,
                left.reward,
                uint256(left.contribution),
                right.digest,
                right.cumulative,
                right.reward,
                uint256(right.contribution)
            )
        );
        uint256 cumulative = uint256(left.cumulative) + right.cumulative;
        uint256 reward = uint256(left.reward) + right.reward;
        uint256 contribution = uint256(left.contribution) + right.contribution;
        if ((cumulative | reward | contribution) >> 128 != 0) revert BadProof();
        return Node(digest, uint128(cumulative), uint128(reward), uint128(contribution));
    }
}
